//! dpkg's database as it stands after unpacking and before configuring (dpkg(1), deb-triggers(5)).
//!
//! What `dpkg --unpack` would have written below `/var/lib/dpkg`: `status` with every package `unpacked` and its
//! conffiles new, the files of each control archive and the list of what was unpacked under `info`, and the triggers
//! that packages wait for. Pure: packages in, files out.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::deb::{Deb, DebError};

/// The folder of the database.
pub const FOLDER: &str = "var/lib/dpkg";
/// Folders below it.
pub const FOLDERS: [&str; 5] = ["alternatives", "info", "parts", "triggers", "updates"];
/// Names in the folder of triggers that are not triggers.
const RESERVED_TRIGGERS: [&str; 3] = ["File", "Lock", "Unincorp"];

/// A package as it was unpacked.
#[derive(Debug)]
pub struct Unpacked<'a> {
    /// The package.
    pub deb: &'a Deb,
    /// Its files by the names it gave them, in path order, without those that another package replaces.
    pub paths: Vec<String>,
}

/// A file of the database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatabaseFile {
    /// Its path below [`FOLDER`].
    pub path: String,
    /// Permission bits.
    pub mode: u16,
    /// What is in it.
    pub bytes: Vec<u8>,
}

/// The database of `packages`, which are sorted by name.
///
/// # Errors
/// The package's name, and [`DebError`] for a control file that lacks what a database needs.
pub fn files(packages: &[Unpacked<'_>]) -> Result<Vec<DatabaseFile>, (String, DebError)> {
    let mut files: Vec<DatabaseFile> = ["available", "diversions", "statoverride", "triggers/Unincorp"]
        .map(|path| file(path.to_owned(), Vec::new()))
        .into();
    files.push(file("info/format".into(), b"1\n".to_vec()));
    let mut status = String::new();
    let mut file_triggers = String::new();
    let mut triggers: BTreeMap<String, String> = BTreeMap::new();
    for package in packages {
        let name = || package.deb.field("Package").unwrap_or_default().to_owned();
        add_package(package, &mut files, &mut status).map_err(|error| (name(), error))?;
        for (trigger, who) in interests(package.deb).map_err(|error| (name(), error))? {
            // Writing to a string cannot fail.
            let _ = if trigger.starts_with('/') {
                writeln!(file_triggers, "{trigger} {who}")
            } else {
                writeln!(triggers.entry(trigger).or_default(), "{who}")
            };
        }
    }
    files.push(file("status".into(), status.into_bytes()));
    files.push(file("triggers/File".into(), file_triggers.into_bytes()));
    files
        .extend(triggers.into_iter().map(|(name, text)| file(format!("triggers/{name}"), text.into_bytes())));
    Ok(files)
}

fn file(path: String, bytes: Vec<u8>) -> DatabaseFile {
    DatabaseFile { path, mode: 0o644, bytes }
}

/// The package's name as the database writes it: with the architecture where several may be installed.
fn name_in_database(deb: &Deb) -> Result<String, DebError> {
    let name = deb.field("Package")?;
    if deb.optional_field("Multi-Arch")? == Some("same") {
        return Ok(format!("{name}:{}", deb.field("Architecture")?));
    }
    Ok(name.to_owned())
}

/// The conffiles that are unpacked, as absolute paths.
pub fn conffiles(deb: &Deb) -> impl Iterator<Item = &str> {
    // A line may have a flag before the path: one that goes on upgrade is not in the package (deb-conffiles(5)).
    deb.lines("conffiles").filter(|line| line.starts_with('/'))
}

fn add_package(
    package: &Unpacked<'_>,
    files: &mut Vec<DatabaseFile>,
    status: &mut String,
) -> Result<(), DebError> {
    let deb = package.deb;
    let id = name_in_database(deb)?;
    for (name, control_file) in &deb.control_files {
        files.push(DatabaseFile {
            path: format!("info/{id}.{name}"),
            mode: control_file.mode & 0o755,
            bytes: control_file.bytes.clone(),
        });
    }
    let mut list = String::from("/.\n");
    for path in &package.paths {
        let _ = writeln!(list, "/{path}");
    }
    files.push(file(format!("info/{id}.list"), list.into_bytes()));
    for line in deb.control.trim().lines() {
        let _ = writeln!(status, "{line}");
        if line.starts_with("Package:") {
            status.push_str("Status: install ok unpacked\n");
        }
    }
    let mut conffiles = conffiles(deb).peekable();
    if conffiles.peek().is_some() {
        status.push_str("Conffiles:\n");
        for path in conffiles {
            let _ = writeln!(status, " {path} newconffile");
        }
    }
    status.push('\n');
    Ok(())
}

/// The triggers that `deb` waits for, and how the database writes who waits.
fn interests(deb: &Deb) -> Result<Vec<(String, String)>, DebError> {
    let id = name_in_database(deb)?;
    let mut interests = Vec::new();
    for line in deb.lines("triggers").filter(|line| !line.starts_with('#')) {
        let mut words = line.split_ascii_whitespace();
        let (Some(directive), Some(trigger)) = (words.next(), words.next()) else { continue };
        let who = match directive {
            "interest" | "interest-await" => id.clone(),
            "interest-noawait" => format!("{id}/noawait"),
            _ => continue,
        };
        let is_name = trigger.starts_with('/')
            || (!trigger.contains('/') && !trigger.starts_with('.') && !RESERVED_TRIGGERS.contains(&trigger));
        if !is_name || trigger.len() > 200 {
            return Err(DebError::Layout("it waits for a trigger that cannot be one"));
        }
        interests.push((trigger.to_owned(), who));
    }
    Ok(interests)
}

#[cfg(test)]
mod tests {
    use kiln_artifact::tree::Tree;

    use super::super::deb::ControlFile;
    use super::*;

    fn deb(control: &str, files: &[(&str, &str)]) -> Deb {
        let control_files = files.iter().map(|(name, text)| {
            ((*name).to_owned(), ControlFile { mode: 0o775, bytes: text.as_bytes().to_vec() })
        });
        Deb { control: control.into(), control_files: control_files.collect(), data: Tree::new() }
    }

    fn text<'a>(files: &'a [DatabaseFile], path: &str) -> &'a str {
        let file = files.iter().find(|file| file.path == path).expect(path);
        std::str::from_utf8(&file.bytes).expect("text")
    }

    #[test]
    fn the_database_is_what_dpkg_writes_after_unpacking() {
        let libc = deb(
            "Package: libc6\nArchitecture: amd64\nMulti-Arch: same\nVersion: 2\nDescription: x\n long\n",
            &[("conffiles", "/etc/ld.so.conf\nremove-on-upgrade /etc/old\n"), ("postinst", "#!/bin/sh\n")],
        );
        let bin = deb(
            "Package: libc-bin\nArchitecture: amd64\nVersion: 2\n",
            &[("triggers", "# why\ninterest ldconfig\ninterest-noawait /usr/lib/x\nactivate-noawait y\n")],
        );
        let files = files(&[
            Unpacked { deb: &bin, paths: vec!["sbin".into(), "sbin/ldconfig".into()] },
            Unpacked { deb: &libc, paths: vec![] },
        ])
        .expect("a database");
        assert_eq!(
            text(&files, "status"),
            "Package: libc-bin\nStatus: install ok unpacked\nArchitecture: amd64\nVersion: 2\n\n\
             Package: libc6\nStatus: install ok unpacked\nArchitecture: amd64\nMulti-Arch: same\nVersion: 2\n\
             Description: x\n long\nConffiles:\n /etc/ld.so.conf newconffile\n\n"
        );
        assert_eq!(text(&files, "info/libc-bin.list"), "/.\n/sbin\n/sbin/ldconfig\n");
        assert_eq!(text(&files, "info/libc6:amd64.list"), "/.\n");
        assert_eq!(text(&files, "info/libc6:amd64.postinst"), "#!/bin/sh\n");
        assert_eq!(text(&files, "triggers/ldconfig"), "libc-bin\n");
        assert_eq!(text(&files, "triggers/File"), "/usr/lib/x libc-bin/noawait\n");
        assert_eq!(text(&files, "info/format"), "1\n");
        let postinst = files.iter().find(|file| file.path.ends_with("postinst")).expect("there");
        assert_eq!(postinst.mode, 0o755);
    }

    #[test]
    fn a_trigger_with_an_impossible_name_is_refused() {
        for name in ["../x", "a/b", "File", ".x"] {
            let bad = deb("Package: aa\n", &[("triggers", &format!("interest {name}\n"))]);
            assert!(files(&[Unpacked { deb: &bad, paths: vec![] }]).is_err(), "{name}");
        }
    }
}
