//! A build that is killed with SIGKILL, at a moment that nobody chose: the store is sound, and the next build gives what a
//! build that nobody disturbed gives, byte for byte. KILN_KILLS says how often; each takes a few seconds.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::build::recipe;
use super::host::{Host, Running, members, soon};

/// How often, where nobody says.
const KILLS: u32 = 4;

const STEPS: &str = r#"
[steps.one]
run = """
mkdir -p $WORK/one/deep/empty
for i in 0 1 2 3 4 5 6 7 8 9; do cat text > $WORK/one/$i; done
cat text text > $WORK/one/deep/twice
ln -s ../0 $WORK/one/deep/link
"""
outputs = ["one"]
[steps.two]
needs = ["one"]
run = "mkdir $WORK/two; tr a-z A-Z < $WORK/one/deep/twice > $WORK/two/upper; chmod 755 $WORK/two/upper"
outputs = ["two"]
[steps.image]
needs = ["one", "two"]
make = { squashfs = "image", from = ["one", "two"] }
"#;

#[expect(clippy::disallowed_methods, reason = "tests are told by the environment how long to go on")]
fn kills() -> u32 {
    std::env::var("KILN_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(KILLS)
}

/// A fraction of `whole` that nobody chose.
fn some_of(whole: Duration) -> Duration {
    let mut bytes = [0; 4];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).expect("entropy");
    whole.mul_f64(f64::from(u32::from_ne_bytes(bytes)) / f64::from(u32::MAX))
}

/// All that is at and beneath `folder`: mode, and what is in it.
fn all(folder: &Path) -> BTreeMap<String, (u32, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut open = vec![folder.to_owned()];
    while let Some(path) = open.pop() {
        let meta = fs::symlink_metadata(&path).expect("there");
        let content = match meta.file_type() {
            kind if kind.is_dir() => {
                open.extend(fs::read_dir(&path).expect("a folder").flatten().map(|entry| entry.path()));
                Vec::new()
            }
            kind if kind.is_symlink() => {
                fs::read_link(&path).expect("a link").into_os_string().into_encoded_bytes()
            }
            _ => fs::read(&path).expect("a file"),
        };
        let name = path.strip_prefix(folder).expect("beneath it").display().to_string();
        found.insert(name, (meta.mode(), content));
    }
    found
}

/// A host with this text in its sources.
fn host(text: &str) -> Host {
    let host = Host::new();
    recipe(&host, STEPS);
    host.file("src/text", text);
    host
}

#[test]
fn a_build_that_is_killed_at_any_moment_is_made_good_by_the_next() {
    let texts = ["first\n", "the second\n"];
    let mut longest = Duration::ZERO;
    let clean = texts.map(|text| {
        let host = host(text);
        let began = Instant::now();
        host.end(host.kiln().arg("build"), &[]).ends(0, &["3 run"]);
        longest = began.elapsed();
        all(&host.path("work"))
    });
    let host = host(texts[1]);
    let mut cut_short = 0;
    for (number, (text, clean)) in (0..kills()).zip(texts.iter().zip(&clean).cycle()) {
        host.file("src/text", text);
        let mut kiln = host.kiln();
        let mut running =
            Running::start(kiln.args(["build", "--json"]).stdout(Stdio::null()).stderr(Stdio::null()));
        let group = running.id();
        let moment = some_of(longest);
        let end = Instant::now() + moment;
        while Instant::now() < end && running.try_wait().expect("kiln is ours").is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        if running.try_wait().expect("kiln is ours").is_none() {
            kill_process(Pid::from_child(&running), Signal::KILL).expect("it is ours");
            cut_short += 1;
        }
        running.end();
        soon(5, "all processes of the build are gone", || members(group).is_empty());
        let told = host.end(host.kiln().args(["store", "verify"]), &[]);
        assert_eq!(told.code, Some(0), "kill {number} after {moment:?}: {told:?}");
        let told = host.end(host.kiln().arg("build"), &[]);
        assert_eq!(told.code, Some(0), "kill {number} after {moment:?}: {told:?}");
        assert!(all(&host.path("work")) == *clean, "kill {number} after {moment:?} shows in WORK");
    }
    assert!(cut_short > 0, "no build was cut short");
}
