//! Commands over ssh, to see that a system answers as its people will ask it.
//!
//! A key is all that is shown to a guest, never a password. The guest's host key is the one given, or the first that was
//! seen in this trial: one that changes within it is refused.

use std::path::Path;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use russh::client::AuthResult;
use russh::keys::{HashAlg, PrivateKey, PrivateKeyWithHashAlg, PublicKey};
use russh::{ChannelMsg, Disconnect, client};

use super::trial::Answer;
use crate::plan::harmless;

/// Between attempts to reach a guest whose server is not up yet.
const RETRY: Duration = Duration::from_millis(300);
/// An attempt that a half-booted guest leaves hanging is made again.
const ATTEMPT: Duration = Duration::from_secs(20);
/// Between looks at whether the machine is still there.
const LOOK: Duration = Duration::from_millis(300);
/// What of a command's output is looked at.
const MOST_OUTPUT_BYTES: usize = 1 << 20;

/// Why ssh cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SshError {
    /// A key cannot be read.
    #[error("cannot read the {what} {}", .path.display())]
    Key {
        /// Which key.
        what: &'static str,
        /// Its file.
        path: std::path::PathBuf,
        /// What is wrong.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// kiln cannot sign with keys of this kind.
    #[error("{} is an RSA key, which kiln does not use", .0.display())]
    Rsa(std::path::PathBuf),
    /// The runtime cannot be made.
    #[error("cannot speak ssh")]
    Runtime(#[source] std::io::Error),
}

impl SshError {
    /// What the user can do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Key { what: "private key", .. } => {
                Some("a private key without a passphrase: ssh-keygen -t ed25519 -N '' -f KEY".to_owned())
            }
            Self::Rsa(_) => Some("make one of another kind: ssh-keygen -t ed25519 -N '' -f KEY".to_owned()),
            _ => None,
        }
    }

    /// Whether a key that the user named is to blame.
    #[must_use]
    pub fn is_the_users(&self) -> bool {
        matches!(self, Self::Key { .. } | Self::Rsa(_))
    }
}

/// A host key as far as it is known.
#[derive(Debug, Default)]
struct HostKey {
    // The one that is believed. Written by the first connection where none was given.
    believed: Option<PublicKey>,
    // What was shown first, until somebody has asked for it.
    shown: Option<PublicKey>,
    is_told: bool,
}

/// A way into a guest.
pub struct Ssh {
    runtime: tokio::runtime::Runtime,
    user: String,
    key: Arc<PrivateKey>,
    host_key: Arc<Mutex<HostKey>>,
}

impl Ssh {
    /// A way in as `user` with the private key in `key`; `host_key` is the guest's public one.
    ///
    /// # Errors
    /// A key cannot be read or used.
    pub fn new(user: &str, key: &Path, host_key: Option<&Path>) -> Result<Self, SshError> {
        let failed = |what, path: &Path, source: russh::keys::Error| SshError::Key {
            what,
            path: path.to_owned(),
            source: source.into(),
        };
        let private = russh::keys::load_secret_key(key, None).map_err(|e| failed("private key", key, e))?;
        if private.algorithm().is_rsa() {
            return Err(SshError::Rsa(key.to_owned()));
        }
        let believed = host_key
            .map(|path| russh::keys::load_public_key(path).map_err(|e| failed("host key", path, e)))
            .transpose()?;
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(SshError::Runtime)?;
        Ok(Self {
            runtime,
            user: user.to_owned(),
            key: Arc::new(private),
            host_key: Arc::new(Mutex::new(HostKey { believed, ..HostKey::default() })),
        })
    }

    /// Kind and fingerprint of the host key that the guest showed first; once.
    pub fn host_key(&self) -> Option<String> {
        let mut known = self.host_key.lock().unwrap_or_else(PoisonError::into_inner);
        let shown = known.shown.take()?;
        known.is_told = true;
        Some(described(&shown))
    }

    /// Runs `command` in the guest behind the host's `port` until `deadline`, trying to get in until then, or until the
    /// machine `is_gone`.
    ///
    /// # Errors
    /// Why it did not end, in words.
    pub fn run(
        &self,
        port: u16,
        command: &str,
        deadline: Instant,
        is_gone: &dyn Fn() -> bool,
    ) -> Result<Answer, String> {
        let whole = async {
            let session = loop {
                let attempt = tokio::time::timeout(ATTEMPT, self.connect(port)).await;
                let why = match attempt {
                    Ok(Ok(session)) => break session,
                    // The server is up, and no more attempts make it take the key.
                    Ok(Err(Refusal::Final(why))) => return Err(why),
                    Ok(Err(Refusal::Again(why))) => why,
                    Err(_) => "the server does not answer".to_owned(),
                };
                if Instant::now() + RETRY >= deadline {
                    return Err(format!("no ssh: {why}"));
                }
                tokio::time::sleep(RETRY).await;
            };
            let answer = execute(&session, command).await.map_err(|error| format!("ssh: {error}"));
            let _ = session.disconnect(Disconnect::ByApplication, "", "en").await;
            answer
        };
        let limited = async {
            let mut whole = pin!(whole);
            loop {
                // An answer that the guest gave before the end is still on its way: one more look is for that.
                let was_gone = is_gone();
                let left = deadline.saturating_duration_since(Instant::now());
                match tokio::time::timeout(left.min(LOOK), whole.as_mut()).await {
                    Ok(answer) => return answer,
                    Err(_) if was_gone => return Err("the machine is gone".to_owned()),
                    Err(_) if left <= LOOK => return Err("it did not end in its time".to_owned()),
                    Err(_) => {}
                }
            }
        };
        self.runtime.block_on(limited)
    }

    async fn connect(&self, port: u16) -> Result<client::Handle<Guest>, Refusal> {
        let again = |error: russh::Error| Refusal::Again(error.to_string());
        let guest = Guest { host_key: Arc::clone(&self.host_key) };
        let config = Arc::new(client::Config::default());
        let mut session =
            client::connect(config, ("127.0.0.1", port), guest).await.map_err(|error| match error {
                russh::Error::UnknownKey => Refusal::Final(self.another_host_key()),
                error => again(error),
            })?;
        let key = PrivateKeyWithHashAlg::new(Arc::clone(&self.key), None);
        match session.authenticate_publickey(&self.user, key).await.map_err(again)? {
            AuthResult::Success => Ok(session),
            AuthResult::Failure { remaining_methods, .. } => {
                let user = harmless(self.user.as_bytes());
                let mut why = format!("the guest does not take the key for {user}");
                if remaining_methods.contains(&russh::MethodKind::Password) {
                    why.push_str("; it would take a password, and kiln gives none");
                }
                Err(Refusal::Final(why))
            }
        }
    }

    fn another_host_key(&self) -> String {
        let known = self.host_key.lock().unwrap_or_else(PoisonError::into_inner);
        let believed = known.believed.as_ref().map_or_else(String::new, described);
        format!("the guest's host key is another than {believed}")
    }
}

fn described(key: &PublicKey) -> String {
    format!("{} {}", key.algorithm().as_str(), key.fingerprint(HashAlg::Sha256))
}

/// Why a connection was not made.
enum Refusal {
    /// It may be later.
    Again(String),
    /// It will not.
    Final(String),
}

/// How a command ended and what it printed.
async fn execute(session: &client::Handle<Guest>, command: &str) -> Result<Answer, russh::Error> {
    let mut channel = session.channel_open_session().await?;
    channel.exec(true, command).await?;
    let (mut ended, mut output) = (Err("ended without a status".to_owned()), Vec::new());
    while let Some(message) = channel.wait().await {
        match message {
            ChannelMsg::Data { data } | ChannelMsg::ExtendedData { data, .. } => {
                let room = MOST_OUTPUT_BYTES.saturating_sub(output.len());
                output.extend(&data[..data.len().min(room)]);
            }
            ChannelMsg::ExitStatus { exit_status } => ended = Ok(exit_status),
            ChannelMsg::ExitSignal { signal_name, .. } => {
                let name = format!("{signal_name:?}");
                ended = Err(format!("was killed by signal {}", harmless(name.as_bytes())));
            }
            _ => {}
        }
    }
    Ok(Answer { ended, output })
}

/// The guest's server, as far as it is known.
struct Guest {
    host_key: Arc<Mutex<HostKey>>,
}

impl client::Handler for Guest {
    type Error = russh::Error;

    async fn check_server_key(
        &mut self,
        shown: &russh::keys::PublicKeyOrCertificate,
    ) -> Result<bool, Self::Error> {
        let mut known = self.host_key.lock().unwrap_or_else(PoisonError::into_inner);
        let shown = shown.public_key();
        if !known.is_told {
            known.shown.get_or_insert_with(|| shown.clone());
        }
        Ok(known.believed.get_or_insert_with(|| shown.clone()).key_data() == shown.key_data())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use russh::keys::ssh_key::LineEnding;
    use russh::keys::ssh_key::private::Ed25519Keypair;
    use russh::server::{self, Auth, ChannelOpenHandle, Msg, Session, VerifiedPublicKey};
    use russh::{Channel, ChannelId, MethodKind, MethodSet};

    use super::*;

    fn key(seed: u8) -> PrivateKey {
        PrivateKey::from(Ed25519Keypair::from_seed(&[seed; 32]))
    }

    /// A guest that takes the key of seed 1, or any password, and answers a command with its text and length.
    struct Played;

    impl server::Handler for Played {
        type Error = russh::Error;

        async fn auth_password(&mut self, _: &str, _: &str) -> Result<Auth, Self::Error> {
            Ok(Auth::Accept)
        }

        async fn auth_publickey(
            &mut self,
            _: &str,
            shown: VerifiedPublicKey<'_>,
        ) -> Result<Auth, Self::Error> {
            Ok(if shown.public_key.key_data() == key(1).public_key().key_data() {
                Auth::Accept
            } else {
                Auth::reject()
            })
        }

        async fn channel_open_session(
            &mut self,
            _: Channel<Msg>,
            reply: ChannelOpenHandle,
            _: &mut Session,
        ) -> Result<(), Self::Error> {
            reply.accept().await;
            Ok(())
        }

        async fn exec_request(
            &mut self,
            channel: ChannelId,
            command: &[u8],
            session: &mut Session,
        ) -> Result<(), Self::Error> {
            session.channel_success(channel)?;
            session.data(channel, command.to_vec())?;
            session.exit_status_request(channel, u32::try_from(command.len()).expect("a short command"))?;
            session.close(channel)
        }
    }

    /// Serves one connection for each of the host keys, by seed; gives the port.
    fn serve(host_keys: &'static [u8]) -> u16 {
        let (sender, port) = mpsc::channel();
        std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
                sender.send(listener.local_addr().expect("it is bound").port()).expect("it is awaited");
                for seed in host_keys {
                    let (stream, _) = listener.accept().await.expect("a connection");
                    let methods = MethodSet::from(&[MethodKind::PublicKey, MethodKind::Password][..]);
                    let config = server::Config { keys: vec![key(*seed)], methods, ..Default::default() };
                    if let Ok(session) = server::run_stream(Arc::new(config), stream, Played).await {
                        let _ = session.await;
                    }
                }
            });
        });
        port.recv().expect("the port")
    }

    fn ssh(seed: u8) -> Ssh {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("key");
        std::fs::write(&path, key(seed).to_openssh(LineEnding::LF).expect("a key").as_bytes()).expect("room");
        Ssh::new("root", &path, None).expect("a key")
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn a_command_gives_its_status_and_what_it_printed_and_the_host_key_is_told_once() {
        let (ssh, port) = (ssh(1), serve(&[7, 7]));
        assert_eq!(ssh.host_key(), None);
        let answer = ssh.run(port, "abc", soon(), &|| false).expect("it answers");
        assert_eq!(answer, Answer { ended: Ok(3), output: b"abc".to_vec() });
        let told = ssh.host_key().expect("it was shown");
        assert!(told.starts_with("ssh-ed25519 SHA256:"), "{told}");
        assert_eq!(ssh.run(port, "", soon(), &|| false).expect("it answers").ended, Ok(0));
        assert_eq!(ssh.host_key(), None);
    }

    #[test]
    fn a_key_that_is_refused_is_said_to_be_and_no_password_is_tried() {
        let refused = ssh(2).run(serve(&[7]), "abc", soon(), &|| false);
        let why = "the guest does not take the key for root; it would take a password, and kiln gives none";
        assert_eq!(refused, Err(why.to_owned()));
    }

    #[test]
    fn a_host_key_that_changes_is_refused() {
        let (ssh, port) = (ssh(1), serve(&[7, 8]));
        ssh.run(port, "abc", soon(), &|| false).expect("it answers");
        let why = ssh.run(port, "abc", soon(), &|| false).expect_err("it is another");
        assert!(why.starts_with("the guest's host key is another than ssh-ed25519 SHA256:"), "{why}");
    }

    #[test]
    fn a_server_that_never_comes_is_waited_for_until_the_deadline() {
        let port =
            std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a port").local_addr().expect("bound");
        let why = ssh(1).run(port.port(), "abc", Instant::now() + Duration::from_millis(100), &|| false);
        assert!(why.expect_err("nobody is there").starts_with("no ssh: "));
    }

    #[test]
    fn a_guest_whose_machine_is_gone_is_not_waited_for() {
        // It takes connections, and says nothing.
        let silent = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let port = silent.local_addr().expect("bound").port();
        assert_eq!(ssh(1).run(port, "abc", soon(), &|| true), Err("the machine is gone".to_owned()));
    }

    #[test]
    fn what_is_no_key_is_refused_by_name() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), "nonsense").expect("room");
        let error = Ssh::new("root", file.path(), None).err().expect("it is none");
        assert!(error.to_string().starts_with("cannot read the private key") && error.is_the_users());
    }
}
