//! What happens on the host in the middle of a case: `host VERB PATH …`, in the folder of the case.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags, mknodat, setxattr, utimensat,
};

use super::folder::Folder;
use super::script::Step;

/// A path that does not leave the folder.
pub fn inside(folder: &Folder, path: &Path) -> Result<PathBuf, String> {
    let plain = path.components().all(|part| matches!(part, Component::Normal(_)));
    if plain { Ok(folder.root().join(path)) } else { Err("the path leaves the folder".to_owned()) }
}

/// Does what the statement says.
pub fn change(folder: &Folder, step: &Step) -> Result<(), String> {
    let path = inside(folder, &step.path_at(1)?)?;
    let result = match step.word(0) {
        "file" => fs::write(&path, step.bytes_at(2)?),
        "dir" => fs::create_dir(&path),
        "link" => symlink(step.path_at(2)?, &path),
        "hardlink" => fs::hard_link(inside(folder, &step.path_at(2)?)?, &path),
        "remove" if path.is_dir() && !path.is_symlink() => fs::remove_dir_all(&path),
        "remove" => fs::remove_file(&path),
        "rename" => fs::rename(&path, inside(folder, &step.path_at(2)?)?),
        "mode" => fs::set_permissions(&path, fs::Permissions::from_mode(step.number_at(2)?)),
        "size" => {
            let size = step.number_at(2)?;
            File::options()
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
                .and_then(|file| file.set_len(size))
        }
        // In seconds since 1970, the last access and the last change.
        "times" => {
            let time = Timespec { tv_sec: step.number_at(2)?, tv_nsec: 999_999_999 };
            let times = Timestamps { last_access: time, last_modification: time };
            utimensat(CWD, &path, &times, AtFlags::SYMLINK_NOFOLLOW).map_err(Into::into)
        }
        "fifo" => mknodat(CWD, &path, FileType::Fifo, Mode::from(0o600), 0).map_err(Into::into),
        "socket" => UnixListener::bind(&path).map(drop),
        "xattr" => {
            let (name, value) = (step.bytes_at(2)?, step.bytes_at(3)?);
            setxattr(&path, &name[..], &value, XattrFlags::empty()).map_err(Into::into)
        }
        "files" => {
            let count: u64 = step.number_at(2)?;
            // Names of few inodes: a million files would take minutes. ext4 gives an inode 65,000 names.
            fs::create_dir_all(&path).and_then(|()| {
                (0..count).try_for_each(|number| {
                    let one = folder.root().join(format!("one{}", number / 50_000));
                    if number % 50_000 == 0 {
                        fs::write(&one, "one")?;
                    }
                    fs::hard_link(one, path.join(number.to_string()))
                })
            })
        }
        word => return Err(format!("the host does not `{word}`")),
    };
    result.map_err(|error| format!("{} `{}`: {error}", step.word(0), path.display()))
}
