//! An empty qcow2 file of a given size: what a guest writes goes there, and the image that it booted stays as it is. Pure.
//!
//! Version 3 (QEMU's `docs/interop/qcow2.rst`), one cluster each for the header, the table of reference counts, its only
//! block, and as many as needed for the first table of addresses, all of which are zero: nothing is allocated, so
//! everything is read from the image below, which QEMU is told of by its command line alone.

/// 64 KiB, QEMU's default.
const CLUSTER_BITS: u32 = 16;
const CLUSTER_BYTES: u64 = 1 << CLUSTER_BITS;
/// A second-level table is a cluster of 8-byte entries, each for a cluster.
const BYTES_PER_TABLE: u64 = CLUSTER_BYTES / 8 * CLUSTER_BYTES;
/// How many clusters one block of 16-bit reference counts counts.
const COUNTED_CLUSTERS: u64 = CLUSTER_BYTES / 2;

/// The file for a disk of `size_bytes`; none for a disk of more than some 100 PiB.
pub fn empty(size_bytes: u64) -> Option<Vec<u8>> {
    let entries = size_bytes.div_ceil(BYTES_PER_TABLE).max(1);
    let table_clusters = (entries * 8).div_ceil(CLUSTER_BYTES);
    let clusters = 3 + table_clusters;
    if clusters > COUNTED_CLUSTERS {
        return None;
    }
    let mut bytes = vec![0; usize::try_from(clusters * CLUSTER_BYTES).ok()?];
    let header = [
        b"QFI\xfb".to_vec(),
        3u32.to_be_bytes().to_vec(),
        // No name of an image below.
        0u64.to_be_bytes().to_vec(),
        0u32.to_be_bytes().to_vec(),
        CLUSTER_BITS.to_be_bytes().to_vec(),
        size_bytes.to_be_bytes().to_vec(),
        // Not encrypted.
        0u32.to_be_bytes().to_vec(),
        u32::try_from(entries).ok()?.to_be_bytes().to_vec(),
        (3 * CLUSTER_BYTES).to_be_bytes().to_vec(),
        CLUSTER_BYTES.to_be_bytes().to_vec(),
        1u32.to_be_bytes().to_vec(),
        // No snapshots, and no features.
        [0; 4 + 8 + 24].to_vec(),
        // Reference counts of 2^4 bits; the header's length.
        4u32.to_be_bytes().to_vec(),
        104u32.to_be_bytes().to_vec(),
    ]
    .concat();
    bytes[..header.len()].copy_from_slice(&header);
    let cluster = usize::try_from(CLUSTER_BYTES).ok()?;
    bytes[cluster..cluster + 8].copy_from_slice(&(2 * CLUSTER_BYTES).to_be_bytes());
    for index in 0..usize::try_from(clusters).ok()? {
        bytes[2 * cluster + 2 * index + 1] = 1;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_has_room_for_every_table_that_its_disk_needs() {
        assert_eq!(empty(0).expect("small").len(), 4 << 16);
        assert_eq!(empty(1 << 30).expect("small").len(), 4 << 16);
        let large = empty(1 << 46).expect("64 TiB");
        assert_eq!(large.len(), (3 + 16) << 16);
        assert_eq!(large[36..40], (1u32 << 17).to_be_bytes());
        assert_eq!(
            large[(2 << 16) + 1..].iter().step_by(2).take(20).filter(|count| **count == 1).count(),
            19
        );
        assert!(empty(u64::MAX).is_none());
    }
}
