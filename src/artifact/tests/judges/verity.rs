//! dm-verity trees, judged by veritysetup both ways.

use std::fs::{self, File};
use std::path::Path;

use kiln_artifact::verity::{self, Parameters, VerityError};
use kiln_digest::Digest;

use super::judge::run;

fn data(blocks: usize) -> Vec<u8> {
    (0..blocks * verity::BLOCK_BYTES).map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect()
}

/// Writes data and tree into `folder`, and returns the parameters and the root hash.
fn made(blocks: usize, folder: &Path) -> (Parameters, Digest) {
    let data = data(blocks);
    fs::write(folder.join("data"), &data).expect("room");
    let parameters = Parameters::derived(&Digest::of(&data));
    let file = File::open(folder.join("data")).expect("written");
    let tree = File::create(folder.join("tree")).expect("created");
    let root = verity::write(&file, &parameters, tree).expect("whole blocks");
    (parameters, root)
}

/// One block (which has no tree), the last that one block of hashes holds, the first that it does not; three levels.
const SIZES: [usize; 6] = [1, 2, 128, 129, 128 * 128, 128 * 128 + 1];

#[test]
fn veritysetup_verifies_our_trees() {
    for blocks in SIZES {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (_, root) = made(blocks, folder.path());
        run("veritysetup", ["verify", "data", "tree", &root.to_string()], folder.path(), b"");
    }
}

#[test]
fn veritysetup_makes_the_same_tree_of_the_same_salt() {
    for blocks in SIZES {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (parameters, root) = made(blocks, folder.path());
        let salt: String = parameters.salt().iter().map(|byte| format!("{byte:02x}")).collect();
        let dump = String::from_utf8(run("veritysetup", ["dump", "tree"], folder.path(), b"")).expect("text");
        let uuid = dump.lines().find_map(|line| line.strip_prefix("UUID:")).expect("a UUID").trim();
        let arguments = [
            "format",
            &format!("--salt={salt}"),
            &format!("--uuid={uuid}"),
            "--root-hash-file=root",
            "data",
            "theirs",
        ];
        run("veritysetup", arguments, folder.path(), b"");
        assert_eq!(fs::read_to_string(folder.path().join("root")).expect("written").trim(), root.to_string());
        let read = |name: &str| fs::read(folder.path().join(name)).expect("written");
        assert!(read("tree") == read("theirs"), "{blocks}");
    }
}

#[test]
fn we_verify_veritysetups_trees_and_see_what_it_sees() {
    for blocks in SIZES {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let bytes = data(blocks);
        fs::write(folder.path().join("data"), &bytes).expect("room");
        // Its own random salt.
        run("veritysetup", ["format", "--root-hash-file=root", "data", "tree"], folder.path(), b"");
        let root = fs::read_to_string(folder.path().join("root")).expect("written");
        let root: Digest = root.trim().parse().expect("a digest");
        let tree = File::open(folder.path().join("tree")).expect("written");
        verity::verify(&&bytes[..], &tree, &root).expect("untouched");
        let mut bad = bytes.clone();
        *bad.last_mut().expect("not empty") ^= 1;
        let error = verity::verify(&&bad[..], &tree, &root).expect_err("flipped");
        match error {
            VerityError::CorruptData(at) => assert_eq!(at, blocks as u64 - 1),
            VerityError::Root { .. } => assert_eq!(blocks, 1, "without a tree there is only the root"),
            other => unreachable!("{other}"),
        }
    }
}
