//! The owner's configuration in /local of the initrd: which files win, what may be among them, and what never.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::os::unix::net::UnixListener;

use super::built::{Built, section, shell};
use crate::acceptance::held;

#[test]
fn what_a_host_has_wins_over_what_all_have_and_nothing_but_the_patch_differs() {
    let built = Built::with_keys();
    built.secret("local/etc/hostname", b"all\n");
    built.secret("local/etc/motd", b"welcome\n");
    built.secret("local/net", b"a file\n");
    built.secret("hosts/alice/local/etc/hostname", b"alice\n");
    built.secret("hosts/alice/local/net/wlan", b"a folder now\n");
    built.secret("hosts/bob/local/authorized_keys", b"ssh-ed25519 AAAA bob\n");
    built.secret("hosts/bob/elsewhere", b"not for the initrd\n");
    built.secret("local/run.sh", b"#!/bin/sh\n");
    fs::set_permissions(built.host.path("secrets/local/run.sh"), fs::Permissions::from_mode(0o4755))
        .expect("a mode");
    symlink("etc/motd", built.host.path("secrets/local/issue")).expect("a link");
    symlink("../etc/motd", built.secret("local/a/b", b"").with_file_name("up")).expect("a link");

    let signed = |arguments: &[&str]| {
        let told = built.sign(arguments);
        told.succeeds();
        (told, built.signed(), built.local())
    };
    let (_, _, all) = signed(&[]);
    assert_eq!(all["etc/hostname"], "all\n");
    assert_eq!(all["net"], "a file\n");
    assert_eq!(all["issue"], "-> etc/motd");
    assert_eq!(all["a/up"], "-> ../etc/motd");
    let mode = fs::metadata(built.host.path("unpacked/local/run.sh")).expect("unpacked").permissions().mode();
    assert_eq!(mode & 0o7777, 0o755, "set-id goes");
    let (_, first, alice) = signed(&["--host", "alice"]);
    assert_eq!(alice["etc/hostname"], "alice\n");
    assert_eq!(alice["etc/motd"], "welcome\n");
    assert_eq!(alice["net/wlan"], "a folder now\n");
    assert!(!alice.contains_key("net"));
    let (_, second, bob) = signed(&["--host", "bob"]);
    assert_eq!(bob["authorized_keys"], "ssh-ed25519 AAAA bob\n");
    assert!(bob.keys().all(|path| !path.contains("elsewhere")));
    for name in [".linux", ".osrel", ".cmdline", ".uname", ".sbat"] {
        assert!(section(&first, name) == section(&second, name), "{name}");
    }
    // Nobody knows this one: said, and no error.
    let (told, unknown, same) = signed(&["--host", "carol"]);
    assert!(told.stderr.contains("nothing is configured for host \"carol\""), "{}", told.stderr);
    assert_eq!(same, all);
    assert!(unknown != first);
    for name in ["..", "a/b", ""] {
        built.sign(&["--host", name]).fails(2, &["is no name of a host"]);
    }
    held("host-config");
}

#[test]
fn a_folder_of_configuration_can_be_named_and_takes_the_place_of_secrets() {
    let built = Built::with_keys();
    built.secret("local/etc/hostname", b"of secrets\n");
    shell(
        "mkdir -p conf/local/etc conf/hosts/alice/local other; echo given >conf/local/etc/issue;
        echo alice >conf/hosts/alice/local/name; chmod -R go-w conf other",
        &built.host.path("."),
    );
    built.sign(&["--config", "conf", "--host", "alice"]).succeeds();
    let local = built.local();
    assert_eq!((local["etc/issue"].as_str(), local["name"].as_str()), ("given\n", "alice\n"));
    assert!(!local.contains_key("etc/hostname") && local.contains_key("root.pem"));
    built
        .sign(&["--config", "other"])
        .fails(1, &["neither `local` nor `hosts`"])
        .hints(&["DIR/hosts/HOST/local"]);
    built.sign(&["--config", "missing"]).fails(1, &["missing"]);
    shell("mv conf work/", &built.host.path("."));
    for config in ["work/conf", "."] {
        built.sign(&["--config", config]).fails(1, &["WORK", "contains the configuration", "or lies in it"]);
    }
}

#[test]
fn what_no_initrd_should_have_is_refused_by_name() {
    let refused = |change: &dyn Fn(&Built), words: &[&str]| {
        let built = Built::with_keys();
        built.secret("local/etc/hostname", b"all\n");
        change(&built);
        built.sign(&["-n", "--host", "alice"]).fails(1, words);
        built.sign(&["--host", "alice"]).fails(1, words);
        built.has_signed_nothing();
    };
    let place = |built: &Built, path: &str| built.host.path("secrets/local").join(path);
    refused(
        &|built| shell("mkfifo secrets/local/etc/pipe", &built.host.path(".")),
        &["local/etc/pipe", "a FIFO"],
    );
    refused(
        &|built| drop(UnixListener::bind(place(built, "s")).expect("a socket")),
        &["local/s", "a socket"],
    );
    for text in ["/etc/passwd", "../../uefi-keys/db.key", "../..", "a/../../../x"] {
        refused(
            &|built| symlink(text, place(built, "etc/link")).expect("a link"),
            &["local/etc/link", "leads out", text],
        );
    }
    // Another image than the one that was verified would be opened.
    for name in ["initos.hash", "hash.recovery", "hash.firmware"] {
        refused(&|built| drop(built.secret(&format!("local/{name}"), b"0")), &[name, "verified root hash"]);
        let path = format!("hosts/alice/local/{name}");
        refused(&|built| drop(built.secret(&path, b"0")), &[name, "verified root hash"]);
    }
    refused(
        &|built| fs::set_permissions(place(built, "etc"), fs::Permissions::from_mode(0o777)).expect("a mode"),
        &["local/etc", "written by others"],
    );
    refused(
        &|built| {
            let mode = fs::Permissions::from_mode(0o666);
            fs::set_permissions(place(built, "etc/hostname"), mode).expect("a mode");
        },
        &["local/etc/hostname", "written by others"],
    );
}

#[test]
fn no_signing_key_goes_into_an_image_in_whatever_form() {
    let refused = |script: &str, words: &[&str]| {
        let built = Built::with_keys();
        built.secret("local/etc/hostname", b"all\n");
        shell(&format!("umask 022; cd secrets; {script}"), &built.host.path("."));
        built.sign(&["--host", "alice"]).fails(1, words).hints(&["SECRETS"]);
        built.has_signed_nothing();
    };
    refused("cp -r uefi-keys local/", &["local/uefi-keys", "folder of keys"]);
    refused("cp uefi-keys/db.key local/etc/innocent", &["local/etc/innocent", "`db.key`"]);
    refused("mkdir -p hosts/alice/local; cp uefi-keys/PK.key hosts/alice/local/x", &["`PK.key`"]);
    refused("sed 's/$/\\r/' uefi-keys/KEK.key >local/dos", &["`KEK.key`"]);
    refused("(echo text; cat uefi-keys/root.key) >local/bundle", &["`root.key`"]);
    refused("openssl pkcs8 -topk8 -nocrypt -in uefi-keys/db.key -outform DER -out local/der", &["`db.key`"]);
    refused("openssl rsa -traditional -in uefi-keys/db.key -out local/old 2>/dev/null", &["`db.key`"]);
    refused("openssl ec -in uefi-keys/root.key -out local/ec 2>/dev/null", &["`root.key`"]);
    refused("openssl ec -in uefi-keys/root.key -outform DER -out local/ec 2>/dev/null", &["`root.key`"]);
    refused(
        "openssl rsa -traditional -in uefi-keys/db.key -outform DER -out local/old 2>/dev/null",
        &["`db.key`"],
    );
    // The key itself is elsewhere, a copy of it is not.
    refused(
        "openssl rsa -traditional -in uefi-keys/PK.key -out local/old 2>/dev/null; mv uefi-keys/PK.key ..",
        &["`PK.key`"],
    );
    // Another's key, and what is public, may be there.
    let built = Built::with_keys();
    shell(
        "umask 022; mkdir secrets/local; openssl genrsa -out secrets/local/host.key 2>/dev/null
        cp secrets/uefi-keys/db.crt secrets/local/; chmod 600 secrets/local/host.key",
        &built.host.path("."),
    );
    built.sign(&[]).succeeds();
    assert!(built.local()["host.key"].contains("PRIVATE KEY"));
    held("sqfs-content");
}
