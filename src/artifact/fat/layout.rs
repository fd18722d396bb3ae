//! Where everything of an image lies: reserved sectors, two tables, folders, then files, in path order and whole.

use super::{FatError, MAX_FILE_BYTES, directory};
use crate::tree::{Entries, Kind};

pub(super) const SECTOR_BYTES: usize = 512;
pub(super) const SECTOR: u64 = 512;
/// What is before the first table: boot sector, information and their copies.
pub(super) const RESERVED_SECTORS: u16 = 32;
/// Where the copies are.
pub(super) const BACKUP_SECTOR: u64 = 6;
/// How many tables there are.
pub(super) const TABLES: u8 = 2;
/// The first cluster there is, and the root folder's.
pub(super) const ROOT_CLUSTER: u32 = 2;
/// What makes it FAT32: as many clusters (specification, *FAT Type Determination*), and some more, since some readers
/// are off by a few.
const LEAST_CLUSTERS: u64 = 65_525 + 16;
/// Numbers from 0x0fff_fff7 are no clusters.
const MOST_CLUSTERS: u64 = 0x0fff_fff5;
/// A folder's entries lie within 2 MiB.
const MOST_FOLDER_BYTES: u64 = 65_536 * directory::ENTRY_BYTES as u64;
/// How large clusters are by the size of the volume, as the specification's table for FAT32 has it: up to so many
/// sectors of volume, so many of cluster.
const CLUSTER_SECTORS: [(u64, u8); 5] =
    [(532_480, 1), (16_777_216, 8), (33_554_432, 16), (67_108_864, 32), (u64::MAX, 64)];

/// The layout.
pub(super) struct Layout {
    pub sectors: u64,
    pub sectors_per_cluster: u8,
    pub table_sectors: u32,
    /// How many clusters there are, and how many of them are used: the first ones.
    pub clusters: u32,
    pub used_clusters: u32,
    /// By the index of a name: where its content begins; 0 for a file without any.
    pub first_clusters: Vec<u32>,
    /// The runs of clusters in order: first and how many.
    pub chains: Vec<(u32, u32)>,
}

impl Layout {
    /// The layout of an image of `size_bytes`, or of the shortest that there is.
    pub fn new(entries: &Entries<'_>, size_bytes: Option<u64>) -> Result<Self, FatError> {
        let lengths =
            (0..entries.len()).map(|index| length(entries, index)).collect::<Result<Vec<u64>, _>>()?;
        let needed = |cluster: u8| -> u64 {
            let cluster_bytes = u64::from(cluster) * SECTOR;
            lengths.iter().map(|length| length.div_ceil(cluster_bytes)).sum()
        };
        // The smallest clusters at which the shortest image for them is not beyond what they are for.
        let shortest = CLUSTER_SECTORS.iter().find_map(|&(most, cluster)| {
            let sectors = sectors_for(needed(cluster).max(LEAST_CLUSTERS), cluster);
            (sectors <= most).then_some((sectors, cluster))
        });
        let (least, cluster) = shortest.unwrap_or((u64::MAX, 64));
        let most = u64::from(u32::MAX);
        let bad_size = |asked| FatError::Size {
            asked,
            least: least.saturating_mul(SECTOR),
            most: most.saturating_mul(SECTOR),
        };
        let (sectors, sectors_per_cluster) = match size_bytes {
            None => (least, cluster),
            Some(bytes) => {
                let sectors = bytes / SECTOR;
                let by_size = CLUSTER_SECTORS.iter().find(|(most, _)| sectors <= *most);
                let cluster = by_size.map_or(64, |(_, cluster)| *cluster);
                // A size just beyond a step may have too few of the larger clusters.
                let fitting = [cluster, 1, 8].into_iter().find(|&cluster| {
                    clusters_in(sectors, cluster).is_some_and(|(_, clusters)| {
                        (needed(cluster).max(LEAST_CLUSTERS)..=MOST_CLUSTERS).contains(&clusters)
                    })
                });
                (sectors, fitting.filter(|_| bytes.is_multiple_of(SECTOR)).ok_or_else(|| bad_size(bytes))?)
            }
        };
        let asked = size_bytes.unwrap_or(sectors.saturating_mul(SECTOR));
        let found = clusters_in(sectors, sectors_per_cluster).filter(|_| sectors <= most);
        let (table_sectors, clusters) = found.ok_or_else(|| bad_size(asked))?;
        let in_field = |number: u64| u32::try_from(number).map_err(|_| bad_size(asked));
        let mut layout = Self {
            sectors,
            sectors_per_cluster,
            table_sectors: in_field(table_sectors)?,
            clusters: in_field(clusters)?,
            used_clusters: 0,
            first_clusters: vec![0; lengths.len()],
            chains: Vec::new(),
        };
        let is_folder = |index: &usize| matches!(entries[*index].node.kind, Kind::Directory);
        let (folders, files): (Vec<usize>, Vec<usize>) = (0..entries.len()).partition(is_folder);
        for index in folders.into_iter().chain(files) {
            let count = in_field(lengths[index].div_ceil(u64::from(sectors_per_cluster) * SECTOR))?;
            if count > 0 {
                let first = ROOT_CLUSTER + layout.used_clusters;
                layout.first_clusters[index] = first;
                layout.chains.push((first, count));
                layout.used_clusters += count;
            }
        }
        Ok(layout)
    }

    /// Where a table begins.
    pub fn table_at(&self, copy: u8) -> u64 {
        (u64::from(RESERVED_SECTORS) + u64::from(copy) * u64::from(self.table_sectors)) * SECTOR
    }

    /// Where a cluster begins.
    pub fn cluster_at(&self, cluster: u32) -> u64 {
        let index = u64::from(cluster.saturating_sub(ROOT_CLUSTER));
        self.table_at(TABLES) + index * u64::from(self.sectors_per_cluster) * SECTOR
    }
}

/// How long what a name is for is.
fn length(entries: &Entries<'_>, index: usize) -> Result<u64, FatError> {
    let path = entries[index].path;
    let bad = |what| FatError::Node { path: path.clone(), what };
    match &entries[entries[index].holder].node.kind {
        Kind::File { size, .. } if *size > MAX_FILE_BYTES => Err(bad("a file over 4 GiB")),
        Kind::File { size, .. } => Ok(*size),
        Kind::Directory => {
            let bytes = directory::length(entries, index)?;
            if bytes > MOST_FOLDER_BYTES {
                Err(bad("a folder of more than 65,536 entries"))
            } else {
                Ok(bytes)
            }
        }
        Kind::Symlink(_) => Err(bad("a symbolic link")),
        Kind::CharDevice { .. } | Kind::BlockDevice { .. } => Err(bad("a device")),
        Kind::Fifo => Err(bad("a FIFO")),
        Kind::Socket => Err(bad("a socket")),
        Kind::HardLink(_) => Err(bad("a link to a link")),
    }
}

/// How many sectors an image of at least `clusters` clusters has.
fn sectors_for(clusters: u64, cluster: u8) -> u64 {
    let mut sectors =
        u64::from(RESERVED_SECTORS) + 2 * table_sectors(clusters) + clusters * u64::from(cluster);
    // Where the next cluster would take longer tables, they may be longer already, and leave no room for the last one.
    while clusters_in(sectors, cluster).is_none_or(|(_, found)| found < clusters) {
        sectors += 1;
    }
    sectors
}

/// Sectors of a table: four bytes a cluster, and two more clusters.
fn table_sectors(clusters: u64) -> u64 {
    ((clusters + 2) * 4).div_ceil(SECTOR)
}

/// The length of a table, and how many clusters there are, of an image of `sectors`.
fn clusters_in(sectors: u64, cluster: u8) -> Option<(u64, u64)> {
    let cluster = u64::from(cluster);
    let rest = sectors.checked_sub(u64::from(RESERVED_SECTORS))?;
    // A table for as many as there would be without tables is long enough, if a little too long.
    let mut tables = table_sectors(rest / cluster);
    loop {
        let clusters = rest.checked_sub(2 * tables)? / cluster;
        let smaller = table_sectors(clusters);
        // Room that a shorter table leaves may be for a cluster that it has no entry for.
        if smaller >= tables || table_sectors(rest.checked_sub(2 * smaller)? / cluster) > smaller {
            return Some((tables, clusters));
        }
        tables = smaller;
    }
}
