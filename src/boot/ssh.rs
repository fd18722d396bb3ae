//! Commands over ssh, to see that a system answers as its people will ask it.
//!
//! The guest's host key is the one given, or the first that was seen in this trial: one that changes within it is refused.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use russh::keys::{HashAlg, PrivateKey, PrivateKeyWithHashAlg, PublicKey};
use russh::{ChannelMsg, Disconnect, client};

use crate::plan::harmless;

/// Between attempts to reach a guest whose server is not up yet.
const RETRY: Duration = Duration::from_millis(300);
/// An attempt that a half-booted guest leaves hanging is made again.
const ATTEMPT: Duration = Duration::from_secs(20);
/// What of a command's output is shown where it fails.
const SHOWN_BYTES: usize = 4096;

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
    /// The runtime cannot be made.
    #[error("cannot speak ssh")]
    Runtime(#[source] std::io::Error),
}

/// A way into a guest.
pub struct Ssh {
    runtime: tokio::runtime::Runtime,
    port: u16,
    user: String,
    key: Arc<PrivateKey>,
    // The host key that is believed. Written by the first connection where none was given.
    host_key: Arc<Mutex<Option<PublicKey>>>,
}

impl Ssh {
    /// A way in by the host's `port`, as `user` with the private key in `key`; `host_key` is the guest's public one.
    ///
    /// # Errors
    /// A key cannot be read.
    pub fn new(port: u16, user: &str, key: &Path, host_key: Option<&Path>) -> Result<Self, SshError> {
        let failed = |what, path: &Path, source: russh::keys::Error| SshError::Key {
            what,
            path: path.to_owned(),
            source: source.into(),
        };
        let private = russh::keys::load_secret_key(key, None).map_err(|e| failed("private key", key, e))?;
        let host_key = host_key
            .map(|path| russh::keys::load_public_key(path).map_err(|e| failed("host key", path, e)))
            .transpose()?;
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(SshError::Runtime)?;
        Ok(Self {
            runtime,
            port,
            user: user.to_owned(),
            key: Arc::new(private),
            host_key: Arc::new(Mutex::new(host_key)),
        })
    }

    /// Runs `command` until `deadline`, trying to get in until then. Gives what it printed.
    ///
    /// # Errors
    /// Why it did not succeed, in words.
    pub fn run(&self, command: &str, deadline: Instant) -> Result<Vec<u8>, String> {
        let whole = async {
            let session = loop {
                let attempt = tokio::time::timeout(ATTEMPT, self.connect()).await;
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
            let result = execute(&session, command).await.map_err(|error| format!("ssh: {error}"));
            let _ = session.disconnect(Disconnect::ByApplication, "", "en").await;
            let (status, output) = result?;
            match status {
                Some(0) => Ok(output),
                status => {
                    let how = status
                        .map_or("ended without a status".to_owned(), |s| format!("exited with status {s}"));
                    let said = harmless(&output[..output.len().min(SHOWN_BYTES)]);
                    Err(format!("`{command}` {how}: {}", said.trim()))
                }
            }
        };
        let left = deadline.saturating_duration_since(Instant::now());
        let limited = async { tokio::time::timeout(left, whole).await };
        self.runtime.block_on(limited).unwrap_or_else(|_| Err("it did not end in its time".to_owned()))
    }

    async fn connect(&self) -> Result<client::Handle<Guest>, Refusal> {
        let again = |error: russh::Error| Refusal::Again(error.to_string());
        let guest = Guest { host_key: Arc::clone(&self.host_key) };
        let config = Arc::new(client::Config::default());
        let mut session =
            client::connect(config, ("127.0.0.1", self.port), guest).await.map_err(|error| match error {
                russh::Error::UnknownKey => Refusal::Final("the guest's host key is another".to_owned()),
                error => again(error),
            })?;
        let hash = match self.key.algorithm().is_rsa() {
            true => Some(HashAlg::Sha512),
            false => None,
        };
        let key = PrivateKeyWithHashAlg::new(Arc::clone(&self.key), hash);
        match session.authenticate_publickey(&self.user, key).await.map_err(again)? {
            result if result.success() => Ok(session),
            _ => Err(Refusal::Final(format!("the guest does not take the key for {}", self.user))),
        }
    }
}

/// Why a connection was not made.
enum Refusal {
    /// It may be later.
    Again(String),
    /// It will not.
    Final(String),
}

/// A command's status and what it printed.
async fn execute(
    session: &client::Handle<Guest>,
    command: &str,
) -> Result<(Option<u32>, Vec<u8>), russh::Error> {
    let mut channel = session.channel_open_session().await?;
    channel.exec(true, command).await?;
    let (mut status, mut output) = (None, Vec::new());
    while let Some(message) = channel.wait().await {
        match message {
            ChannelMsg::Data { data } | ChannelMsg::ExtendedData { data, .. } => {
                let room = SHOWN_BYTES.saturating_sub(output.len());
                output.extend(&data[..data.len().min(room)]);
            }
            ChannelMsg::ExitStatus { exit_status } => status = Some(exit_status),
            _ => {}
        }
    }
    Ok((status, output))
}

/// The guest's server, as far as it is known.
struct Guest {
    host_key: Arc<Mutex<Option<PublicKey>>>,
}

impl client::Handler for Guest {
    type Error = russh::Error;

    async fn check_server_key(
        &mut self,
        shown: &russh::keys::PublicKeyOrCertificate,
    ) -> Result<bool, Self::Error> {
        let mut known = self.host_key.lock().unwrap_or_else(PoisonError::into_inner);
        let shown = shown.public_key();
        Ok(known.get_or_insert_with(|| shown.clone()).key_data() == shown.key_data())
    }
}
