//! Debian's archive out of reach, or not Debian's: what was wanted is named, and nothing is locked.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;

use super::host::{Host, NOWHERE, Told};

/// A run of a Debian root or kernel from `mirror`.
fn run(host: &Host, mirror: &str, arguments: &[&str]) -> Told {
    host.file("agent", "an agent");
    host.script("qemu", "exit 1");
    let mut command = host.kiln();
    command.env("KILN_AGENT", host.path("agent")).env("KILN_QEMU", host.path("qemu"));
    command.args(["--debian-mirror", mirror, "--debian-security-mirror", mirror]);
    Told::by(command.args(arguments))
}

/// A mirror that answers every request with `answer`.
fn mirror(answer: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("it is bound");
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut request = BufReader::new(stream.try_clone().expect("a descriptor")).lines();
            while request.next().is_some_and(|line| line.is_ok_and(|line| !line.is_empty())) {}
            let _ = (&stream).write_all(answer.as_bytes());
        }
    });
    format!("http://{address}/debian")
}

#[test]
fn without_a_network_what_was_wanted_is_named() {
    let host = Host::new();
    for arguments in [&["kernel"][..], &["run", "--", "true"]] {
        let code = if arguments[0] == "kernel" { 1 } else { 125 };
        let told = run(&host, NOWHERE, arguments);
        told.fails(code, &["cannot fetch", NOWHERE, "InRelease"]).hints(&["network", "mirror"]);
        assert!(!host.path("kiln.lock").exists());
    }
    host.is_untouched();
}

#[test]
fn a_locked_kernel_that_is_not_in_the_store_is_named() {
    let host = Host::new();
    let (digest, name) = ("7".repeat(64), "linux-image-6.12.0-1-cloud-amd64");
    host.file(
        "kiln.lock",
        format!(
            r#"version = 1

[[kernel]]
spec = "debian:trixie"
release = "6.12.0-1-cloud-amd64"
indexes = [
  {{ suite = "trixie", date = "2026-11-21T09:15:44Z", sha256 = "{digest}" }},
]
package = {{ name = "{name}", version = "6.12.0-1", architecture = "amd64", suite = "trixie", path = "pool/x.deb", size = 5, sha256 = "{digest}" }}
"#
        ),
    );
    let told = run(&host, NOWHERE, &["kernel", "--kernel-suite", "trixie"]);
    told.fails(1, &["cannot fetch", name, "6.12.0-1", NOWHERE, "pool/x.deb"]).hints(&["network"]);
    host.is_untouched();
}

#[test]
fn a_mirror_without_the_suite_is_told_from_one_out_of_reach() {
    let host = Host::new();
    let mirror = mirror("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    run(&host, &mirror, &["kernel"]).fails(1, &["no suite `trixie`", &mirror]).hints(&["mirror"]);
    assert!(!host.path("kiln.lock").exists());
}

#[test]
fn an_index_that_nobody_signed_is_refused() {
    let host = Host::new();
    let mirror = mirror(
        "HTTP/1.1 200 OK\r\nContent-Length: 37\r\nConnection: close\r\n\r\nOrigin: Debian\nCodename: bookworm\n\n\n\n",
    );
    run(&host, &mirror, &["kernel"]).fails(1, &["trixie", &mirror, "no signature"]);
    assert!(!host.path("kiln.lock").exists());
    host.is_untouched();
}

#[test]
fn a_keyring_that_is_not_there_is_named() {
    let host = Host::new();
    let mirror = mirror("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    let told = run(&host, &mirror, &["kernel", "--debian-keyring", "/nonexistent/keyring.gpg"]);
    told.fails(1, &["/nonexistent/keyring.gpg"]);
}

#[test]
fn a_lock_that_is_damaged_is_named_with_its_line() {
    let host = Host::new();
    host.file("kiln.lock", "version = 1\nnonsense\n");
    run(&host, NOWHERE, &["kernel"])
        .fails(1, &["kiln.lock", "line 2, column 9"])
        .hints(&["kiln.lock", "version control"]);
    host.file("kiln.lock", "version = 99\n");
    run(&host, NOWHERE, &["kernel"]).fails(1, &["kiln.lock", "version 99"]).hints(&["newer kiln"]);
}
