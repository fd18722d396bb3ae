//! Somebody who changes a part while it is signed. The kernel tells him (inotify) that the part was opened or let go of, so each
//! round's change falls where it could do harm: between what is hashed and what is signed.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::UNIX_EPOCH;

use kiln::sign::SignError;
use kiln::sign::images::Source;
use kiln::sign::keys::Keys;
use kiln::sign::local::Local;
use kiln::sign::work::Work;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tempfile::TempDir;

use super::built::{Built, shell};

const ROUNDS: usize = 1000;

/// When the part becomes another, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Swap {
    /// As soon as it is open, by another file under its name: what is open stays what it was.
    NameAtOpen,
    /// As soon as it was read, by another file under its name: whoever opened it again would get that one.
    NameAtClose,
    /// As soon as it is open, in the file itself: what is read may be either, or a part of each.
    BytesAtOpen,
}

const SWAPS: [Swap; 3] = [Swap::NameAtOpen, Swap::NameAtClose, Swap::BytesAtOpen];

/// Signs while `part` becomes `evil` as `swap` says. Gives what came of it, and whether the swap was done by then.
fn race(
    swap: Swap,
    part: &Path,
    evil: &[u8],
    sign: impl FnOnce() -> Result<(), SignError>,
) -> (Result<(), SignError>, bool) {
    let new = part.with_extension("new");
    fs::write(&new, evil).expect("room");
    let watch = inotify::init(CreateFlags::CLOEXEC).expect("a watch");
    let event = if swap == Swap::NameAtClose { WatchFlags::CLOSE_NOWRITE } else { WatchFlags::OPEN };
    inotify::add_watch(&watch, part, event | WatchFlags::ONESHOT).expect("it is there");
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let racer = scope.spawn(|| {
            rustix::io::read(&watch, &mut [0; 512]).expect("an event");
            match swap {
                Swap::NameAtOpen | Swap::NameAtClose => fs::rename(&new, part).expect("it is there"),
                Swap::BytesAtOpen => fs::write(part, evil).expect("it is there"),
            }
            !is_over.load(Ordering::SeqCst)
        });
        let signed = sign();
        is_over.store(true, Ordering::SeqCst);
        // So that the racer ends also where the part was never looked at.
        drop(File::open(part));
        (signed, racer.join().expect("it swaps"))
    })
}

/// Moves WORK to where a sync costs nothing, if there is such a place: in each round a dozen files are synced.
fn move_to_memory(built: &Built) -> TempDir {
    let place = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("room");
    let script = format!("mv work {0}/ && ln -s {0}/work work", place.path().display());
    shell(&script, &built.host.path("."));
    place
}

#[test]
fn whoever_swaps_a_part_while_it_is_signed_gets_no_signature_over_another() {
    let built = Built::with_keys();
    let _in_memory = move_to_memory(&built);
    built.sign(&[]).succeeds();
    // Signing is deterministic, so there is one good image.
    let good_image = built.signed();
    let secrets = built.host.path("secrets");
    let now = kiln::clock::now().duration_since(UNIX_EPOCH).expect("a clock");
    let keys = Keys::open(&secrets, now).expect("whole");
    let sign = || {
        let local = Local::read(&secrets, None, None, Some(&keys)).expect("whole");
        let work = Work::open(&built.work(), &secrets, None)?;
        work.sign(&work.verify()?, &local, &keys, Source::Keys).map(drop)
    };

    let kernel = &built.record.kernels[0];
    let mut parts: Vec<String> = kernel.parts().map(|(_, part)| part.file.clone()).collect();
    for image in &kernel.verity {
        parts.extend([image.image.clone(), image.tree.file.clone(), image.hash.file.clone()]);
    }
    assert!(parts.len() >= 12, "{parts:?}");
    // Swap by swap: how often it was in time, how often all was signed, and how often nothing.
    let mut counts: BTreeMap<Swap, [usize; 3]> = BTreeMap::new();
    for round in 0..ROUNDS {
        let swap = SWAPS[round % SWAPS.len()];
        let part = &parts[round / SWAPS.len() % parts.len()];
        let path = built.work().join(part);
        let good = fs::read(&path).expect("there");
        let evil: Vec<u8> = good.iter().map(|byte| byte ^ 1).collect();
        let (signed, was_in_time) = race(swap, &path, &evil, sign);
        let count = counts.entry(swap).or_default();
        count[0] += usize::from(was_in_time);
        match signed {
            Ok(()) => count[1] += 1,
            // What is not what was built is not signed; another name is never looked at.
            Err(_) if swap == Swap::BytesAtOpen => count[2] += 1,
            Err(error) => panic!("{swap:?} of {part}: {error}"),
        }
        assert!(built.signed() == good_image, "{swap:?} of {part}: another image was signed");
        built.has_no_rest();
        fs::write(&path, &good).expect("room");
    }
    println!("{ROUNDS} rounds; [in time, signed, refused]: {counts:?}");
    for swap in SWAPS {
        assert!(counts[&swap][0] > ROUNDS / 10, "{swap:?} was hardly ever in time: {counts:?}");
    }
    assert!(counts[&Swap::BytesAtOpen][2] > 0, "nothing was ever refused: {counts:?}");
}
