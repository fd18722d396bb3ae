//! Sources over https whose servers show certificates of an authority of one's own: openssl(1) makes them and serves.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};

use kiln_digest::Digest;

use crate::host::{Host, Told};

const CONFIGURATION: &str = "[ca]\ndefault_ca = c\n[c]\ndatabase = index\nserial = serial\nnew_certs_dir = .\ncertificate = ca.pem\n\
    private_key = ca.key\ndefault_md = sha256\npolicy = p\n[p]\ncommonName = supplied\n";
const KEY: [&str; 5] = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];

fn openssl(arguments: &[&[&str]], host: &Host) {
    let output = Command::new("openssl").args(arguments.concat()).current_dir(host.root()).output();
    let output = output.expect("openssl can be started");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A host with an authority, and with a recipe whose one source a server has.
struct Authority(Host);

/// A server, until this is dropped.
struct Server {
    child: Child,
    port: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Authority {
    fn new() -> Self {
        let host = Host::new();
        host.file("a.tar", "some bytes");
        host.file("r/file", "");
        for (name, text) in [("ca.cnf", CONFIGURATION), ("index", ""), ("serial", "01\n")] {
            host.file(name, text);
        }
        let arguments =
            ["req", "-x509", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ours", "-days", "30"];
        openssl(&[&arguments, &KEY], &host);
        Self(host)
    }

    /// Makes a certificate for what `names` says, and serves with it.
    fn server(&self, names: &str, from: &str, until: &str) -> Server {
        let host = &self.0;
        let arguments = ["req", "-keyout", "s.key", "-out", "s.csr", "-subj", "/CN=server"];
        openssl(&[&arguments, &KEY], host);
        host.file("names", format!("subjectAltName = {names}\n"));
        host.file("index", "");
        let arguments = ["ca", "-batch", "-config", "ca.cnf", "-in", "s.csr", "-out", "s.pem", "-notext"];
        let rest = ["-extfile", "names", "-startdate", from, "-enddate", until];
        openssl(&[&arguments, &rest], host);
        let mut child = Command::new("openssl")
            .args(["s_server", "-WWW", "-accept", "127.0.0.1:0", "-cert", "s.pem", "-key", "s.key"])
            .current_dir(host.root())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("openssl can be started");
        let lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        let port =
            lines.map_while(Result::ok).find_map(|line| Some(line.strip_prefix("ACCEPT ")?.to_owned()));
        let port = port.expect("it listens").rsplit(':').next().expect("a port").to_owned();
        Server { child, port }
    }

    fn good(&self) -> Server {
        self.server("IP:127.0.0.1", "20200101000000Z", "20990101000000Z")
    }

    /// Locks the source that `server` has.
    fn update(&self, server: &Server, settings: &str, arguments: &[&str]) -> Told {
        let (port, digest) = (&server.port, Digest::of(b"some bytes"));
        self.0.file(
            "kiln.toml",
            format!(
                "{settings}[sources.a]\nurl = \"https://127.0.0.1:{port}/a.tar\"\nsha256 = \"{digest}\"\n\
                 [steps.s]\nroot = \"dir:r\"\nrun = \"x\"\n"
            ),
        );
        self.0.run(&[&["lock", "update", "a"], arguments].concat())
    }
}

#[test]
fn a_server_that_an_authority_of_ones_own_vouches_for_is_trusted_where_that_is_said_and_nowhere_else() {
    let authority = Authority::new();
    let server = authority.good();
    let told = authority.update(&server, "", &[]);
    told.fails(1, &["source a", "signed by no authority that is trusted"])
        .hints(&["--ca-file", "KILN_CA_FILE"]);
    authority.update(&server, "", &["--ca-file", "ca.pem"]).succeeds();
    let lock = std::fs::read_to_string(authority.0.path("kiln.lock")).expect("a lock");
    assert!(lock.contains(&Digest::of(b"some bytes").to_string()), "{lock}");
    std::fs::remove_dir_all(authority.0.path("store")).expect("ours");
    authority.update(&server, "[settings]\nca-file = \"ca.pem\"\n", &[]).succeeds();
}

#[test]
fn a_certificate_of_another_host_and_one_that_has_expired_are_refused_by_name() {
    let authority = Authority::new();
    let trusting = ["--ca-file", "ca.pem"];
    for (names, until, words, hint) in [
        ("DNS:elsewhere.test", "20990101000000Z", "is another host's", "another mirror"),
        ("IP:127.0.0.1", "20210101000000Z", "has expired", "clock"),
    ] {
        let server = authority.server(names, "20200101000000Z", until);
        let told = authority.update(&server, "", &trusting);
        told.fails(1, &["source a", "127.0.0.1", words]).hints(&[hint]);
    }
    let early = authority.server("IP:127.0.0.1", "20980101000000Z", "20990101000000Z");
    authority.update(&early, "", &trusting).fails(1, &["is not valid yet"]).hints(&["clock"]);
}

#[test]
fn a_file_of_authorities_that_is_none_is_named_with_the_way_out() {
    let authority = Authority::new();
    let server = authority.good();
    authority.0.file("text", "hello\n");
    authority.0.file("bad", "-----BEGIN CERTIFICATE-----\naGVsbG8=\n-----END CERTIFICATE-----\n");
    openssl(&[&["x509", "-in", "ca.pem", "-outform", "DER", "-out", "ca.der"]], &authority.0);
    let update = |file| authority.update(&server, "", &["--ca-file", file]);
    update("none.pem")
        .fails(1, &["none.pem", "certificate authorities"])
        .hints(&["--ca-file", "KILN_CA_FILE"]);
    for file in ["text", "bad", "ca.key", "ca.der"] {
        update(file).fails(1, &[file, "no certificate"]).hints(&["openssl x509"]);
    }
}

#[test]
fn git_trusts_the_same_authorities() {
    let authority = Authority::new();
    let server = authority.good();
    authority.0.file(
        "kiln.toml",
        format!(
            "[sources.s]\ngit = \"https://127.0.0.1:{}/r\"\nrev = \"v1\"\n[steps.s]\nroot = \"dir:r\"\nrun = \"x\"\n",
            server.port
        ),
    );
    let update = |arguments: &[&str]| authority.0.run(&[&["lock", "update", "s"], arguments].concat()).stderr;
    let refused = update(&[]);
    assert!(refused.contains("certificate"), "{refused}");
    // The server has no repository, and git got as far as to hear so.
    let trusted = update(&["--ca-file", "ca.pem"]);
    assert!(!trusted.contains("certificate") && trusted.contains("git cannot"), "{trusted}");
}
