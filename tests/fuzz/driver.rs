//! Runs a target: first its corpus, then inputs made, mixed and changed at random until the time is over.
//!
//! There is no compiler's coverage on stable Rust. In its place a target notes what it saw ([`Seen`]: which request met
//! which error, which message was decoded), and an input that shows something new joins those that are changed further.
#![expect(clippy::print_stdout, clippy::panic, reason = "it tells people what ran and what failed")]

use std::fs;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kiln_digest::Digest;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use crate::meter;
use crate::random::Random;

/// Inputs up to this length are made shorter byte by byte too, which takes about twice as many executions.
const SHORT_BYTES: usize = 512;

/// What is fuzzed.
pub trait Target {
    /// Also the folder of its corpus, and the module of its test.
    const NAME: &'static str;
    /// Longest input that is made.
    const MOST_BYTES: usize = 4096;
    /// A target that has run nothing yet.
    fn new() -> Self;
    /// Makes an input that is right in most places.
    fn generate(&mut self, random: &mut Random, input: &mut Vec<u8>);
    /// Where the parts end that an input is made of: steps, frames. Parts are left out, said twice and exchanged whole.
    fn parts(input: &[u8]) -> Vec<usize> {
        vec![input.len()]
    }
    /// Runs one input, and panics where something is wrong. What it does depends on the input alone.
    fn run(&mut self, input: &[u8], seen: &mut Seen);
    /// Most bytes that running an input of this length may hold.
    fn memory_limit(input_bytes: usize) -> usize;
}

/// What inputs were seen to do, as a set of hashes.
pub struct Seen {
    bits: Box<[u64; 1024]>,
    fresh: Vec<u64>,
}

impl Seen {
    fn new() -> Self {
        Self { bits: Box::new([0; 1024]), fresh: Vec::with_capacity(256) }
    }

    /// Notes one thing that happened.
    pub fn note(&mut self, what: u64) {
        let mut random = Random::new(what);
        let (word, bit) = (random.below(1024), random.below(64));
        if self.bits[word] & 1 << bit == 0 {
            self.bits[word] |= 1 << bit;
            if self.fresh.len() < self.fresh.capacity() {
                self.fresh.push(what);
            }
        }
    }
}

/// The input that is running, in a mapped file, so that it outlives whatever ends the process: its length, its bytes.
struct InFlight(GuestMemoryMmap);

impl InFlight {
    fn new(name: &str, most_bytes: usize) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{name}"));
        let file = fs::File::options().read(true).write(true).create(true).truncate(true).open(path);
        let file = file.expect("a file below the target folder");
        file.set_len(most_bytes as u64 + 4).expect("room");
        let region = (GuestAddress(0), most_bytes + 4, Some(FileOffset::new(file, 0)));
        Self(GuestMemoryMmap::from_ranges_with_files([region]).expect("mapped"))
    }

    fn put(&self, input: &[u8]) {
        self.0.write_slice(input, GuestAddress(4)).expect("as long as the longest");
        self.0.write_obj(u32::try_from(input.len()).expect("short"), GuestAddress(0)).expect("mapped");
    }

    fn clear(&self) {
        self.0.write_obj(0_u32, GuestAddress(0)).expect("mapped");
    }
}

struct Driver<T> {
    target: T,
    seen: Seen,
    in_flight: InFlight,
    executions: u64,
}

impl<T: Target> Driver<T> {
    /// Whether the input runs through.
    fn survives(&mut self, input: &[u8]) -> bool {
        self.in_flight.put(input);
        self.executions += 1;
        self.seen.fresh.clear();
        meter::start();
        let (target, seen) = (&mut self.target, &mut self.seen);
        let result = catch_unwind(AssertUnwindSafe(|| target.run(input, seen)));
        let (peak_bytes, limit) = (meter::peak_bytes(), T::memory_limit(input.len()));
        if result.is_ok() && peak_bytes > limit {
            println!("{peak_bytes} bytes held at a time, {limit} are allowed");
        }
        result.is_ok() && peak_bytes <= limit
    }

    /// Leaves out parts of `input`, and bytes of a short one, as long as it then still is `wanted`.
    fn shrink(&mut self, input: &mut Vec<u8>, mut wanted: impl FnMut(&mut Self, &[u8]) -> bool) {
        let mut ends = T::parts(input);
        while let Some(end) = ends.pop() {
            let start = ends.last().copied().unwrap_or(0);
            self.try_without(input, start..end, &mut wanted);
        }
        let mut piece = input.len() / 2;
        while piece > 0 && input.len() <= SHORT_BYTES {
            let mut at = 0;
            while at < input.len() {
                let end = input.len().min(at + piece);
                if !self.try_without(input, at..end, &mut wanted) {
                    at += piece;
                }
            }
            piece /= 2;
        }
    }

    fn try_without(
        &mut self,
        input: &mut Vec<u8>,
        range: Range<usize>,
        wanted: &mut impl FnMut(&mut Self, &[u8]) -> bool,
    ) -> bool {
        let mut shorter = input.clone();
        shorter.drain(range);
        let is_wanted = wanted(self, &shorter);
        if is_wanted {
            *input = shorter;
        }
        is_wanted
    }

    /// Ends the test with what to do about `input`.
    fn fail(&mut self, mut input: Vec<u8>) -> ! {
        // A target that panicked is of no more use.
        self.target = T::new();
        println!("making the input shorter; what is printed meanwhile is the same failure again");
        self.shrink(&mut input, |driver, shorter| {
            let failed = !driver.survives(shorter);
            if failed {
                driver.target = T::new();
            }
            failed
        });
        self.in_flight.clear();
        let path = keep::<T>("failed", &input);
        panic!("{} is kept; `cargo test --test fuzz {}::` replays it", path.display(), T::NAME)
    }
}

fn folder<T: Target>() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(T::NAME)
}

fn keep<T: Target>(prefix: &str, input: &[u8]) -> PathBuf {
    let name = format!("{prefix}-{}.bin", &Digest::of(input).to_string()[..12]);
    let path = folder::<T>().join(name);
    fs::create_dir_all(folder::<T>()).and_then(|()| fs::write(&path, input)).expect("the corpus");
    path
}

fn corpus<T: Target>() -> Vec<Vec<u8>> {
    let Ok(entries) = fs::read_dir(folder::<T>()) else { return Vec::new() };
    let mut paths: Vec<_> = entries.map(|entry| entry.expect("the corpus").path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).expect("an input")).collect()
}

/// Puts a part of `other` or of `input` itself in the place of one of `input`'s, or before it, or nothing at all.
fn exchange_part<T: Target>(random: &mut Random, input: &mut Vec<u8>, other: &[u8]) {
    let pick = |random: &mut Random, bytes: &[u8]| {
        let ends = T::parts(bytes);
        let index = random.below(ends.len().max(1));
        let start = index.checked_sub(1).map_or(0, |before| ends[before]);
        start..ends.get(index).copied().unwrap_or(start)
    };
    let mut place = pick(random, input);
    let from = if random.once_in(2) { other.to_vec() } else { input.clone() };
    let part = if random.once_in(4) { 0..0 } else { pick(random, &from) };
    if random.once_in(2) {
        place.end = place.start;
    }
    input.splice(place, from[part].iter().copied());
}

#[expect(clippy::disallowed_methods, reason = "how `ci/fuzz` tells the test what to do")]
fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

/// Replays the corpus and then goes on for `KILN_FUZZ_SECONDS` (1) from `KILN_FUZZ_SEED` (0). With `KILN_FUZZ_GROW`,
/// inputs that show something new join the corpus.
pub fn campaign<T: Target>() {
    let seconds = setting("KILN_FUZZ_SECONDS").unwrap_or(1);
    let seed = setting("KILN_FUZZ_SEED").unwrap_or(0);
    let grow = setting("KILN_FUZZ_GROW").is_some();
    let mut driver = Driver {
        target: T::new(),
        seen: Seen::new(),
        in_flight: InFlight::new(T::NAME, 1 << 20),
        executions: 0,
    };
    let mut pool = corpus::<T>();
    for input in &pool {
        if !driver.survives(input) {
            driver.fail(input.clone());
        }
    }
    let replayed = driver.executions;
    assert!(replayed > 0 || grow, "{} holds no input", folder::<T>().display());

    let mut random = Random::new(seed);
    let (start, limit) = (Instant::now(), Duration::from_secs(seconds));
    let mut input = Vec::new();
    // A look at the clock costs as much as a short execution.
    while driver.executions % 64 != 0 || start.elapsed() < limit {
        input.clear();
        if pool.is_empty() || random.below(4) < 3 {
            driver.target.generate(&mut random, &mut input);
        } else {
            input.extend_from_slice(&pool[random.below(pool.len())]);
        }
        let other: &[u8] = if pool.is_empty() { b"" } else { &pool[random.below(pool.len())] };
        match random.below(4) {
            0 => {}
            1 => exchange_part::<T>(&mut random, &mut input, other),
            _ => random.mutate(&mut input, other),
        }
        input.truncate(T::MOST_BYTES);
        if !driver.survives(&input) {
            driver.fail(input);
        }
        if !driver.seen.fresh.is_empty() {
            if grow {
                let fresh = std::mem::take(&mut driver.seen.fresh);
                let before = driver.seen.bits.clone();
                driver.shrink(&mut input, |driver, shorter| {
                    let mut seen = std::mem::replace(&mut driver.seen, Seen::new());
                    let shown = driver.survives(shorter)
                        && fresh.iter().all(|what| {
                            driver.seen.fresh.clear();
                            driver.seen.note(*what);
                            driver.seen.fresh.is_empty()
                        });
                    std::mem::swap(&mut driver.seen, &mut seen);
                    shown
                });
                driver.seen = Seen { bits: before, fresh: Vec::with_capacity(256) };
                keep::<T>("seen", &input);
            }
            pool.push(input.clone());
        }
    }
    driver.in_flight.clear();
    let ran = start.elapsed().as_secs_f64();
    println!(
        "{}: {} executions, {replayed} of them the corpus, in {ran:.1} s: {:.0} a second; seed {seed}; {} things seen",
        T::NAME,
        driver.executions,
        driver.executions as f64 / ran,
        driver.seen.bits.iter().map(|word| word.count_ones()).sum::<u32>(),
    );
}
