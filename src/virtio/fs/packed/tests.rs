use proptest::prelude::*;

use super::*;

prop_compose! {
    fn entry()(
        path in prop::collection::vec(prop::sample::select(&b"ab/-\xff"[..]), 0..12),
        kind in prop::sample::select(&KINDS[..]),
        observed in 0..16_u8,
        numbers in any::<(u64, u64, u64, u32)>(),
        times in any::<(i64, i64)>(),
        extra in prop::option::of(any::<(u32, u32, u32, u32, u64, (u64, u32))>()),
        digests in any::<(Option<[u8; 32]>, Option<[u8; 32]>)>(),
    ) -> Entry {
        let (device, inode, size_bytes, mode) = numbers;
        let (mtime_nanos, ctime_nanos) = times;
        Entry {
            path: PathBytes(path),
            kind,
            observed: Observed::from_bits_truncate(observed),
            fingerprint: Fingerprint { device, inode, size_bytes, mtime_nanos, ctime_nanos, mode },
            extra: extra.map(|(uid, gid, nlink, rdev, blocks, atime)| Extra { uid, gid, nlink, rdev, blocks, atime }),
            listing: digests.0.map(Digest::from_bytes),
            xattrs: digests.1.map(Digest::from_bytes),
        }
    }
}

proptest! {
    #[test]
    fn entries_come_out_as_they_went_in(mut list in prop::collection::vec(entry(), 0..20)) {
        list.sort_by(|one, other| one.path.cmp_as_walked(&other.path));
        list.dedup_by(|one, other| one.path == other.path);
        let (mut entries, mut paths) = (Entries::default(), Paths::default());
        for entry in &list {
            prop_assert!(entries.push(entry) && paths.push(&entry.path));
            prop_assert!(!entries.push(entry) && !paths.push(&entry.path), "it is there");
        }
        prop_assert_eq!((entries.len(), paths.len()), (list.len(), list.len()));
        prop_assert_eq!(paths.iter().collect::<Vec<_>>(), list.iter().map(|entry| entry.path.clone()).collect::<Vec<_>>());
        prop_assert_eq!(entries.iter().collect::<Vec<_>>(), list);
    }
}

#[test]
fn paths_come_in_the_order_of_a_walk() {
    let mut paths = Paths::default();
    for path in ["", "a", "a/b", "a/b/c", "a-b", "a.b/c", "b"] {
        assert!(paths.push(&PathBytes(path.into())), "{path}");
    }
    for path in ["", "a", "a-b", "a/b"] {
        assert!(!paths.push(&PathBytes(path.into())), "{path}");
    }
    assert_eq!(paths.len(), 7);
}
