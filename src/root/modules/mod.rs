//! A kernel's modules: which of their files to load, and in which order.
//!
//! Pure: text and bytes in, names out. What modules need is read from `modules.dep` where there is one
//! (depmod(8)), or from the modules themselves, whose packages leave it to be made. Names are compared as the kernel
//! does: `-` and `_` are one letter.

mod depmod;
mod info;
mod initrd;
mod trie;

use std::collections::{BTreeMap, BTreeSet};

pub use info::{InfoError, ModuleInfo};
pub use initrd::Profile;

/// Why modules cannot be loaded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModulesError {
    /// A module that the kernel does not have.
    #[error("the kernel has no module `{name}`{}", which_needs(.needed_by.as_deref()))]
    Unknown {
        /// The module.
        name: String,
        /// Who needs it, where it was not asked for.
        needed_by: Option<String>,
    },
    /// Modules that need each other.
    #[error("module `{name}` needs itself")]
    Cycle {
        /// One of them.
        name: String,
    },
    /// A line of `modules.dep` that is none.
    #[error("modules.dep, line {line}, is not `MODULE: MODULE…`")]
    Malformed {
        /// The line, counted from one.
        line: usize,
    },
}

fn which_needs(name: Option<&str>) -> String {
    name.map(|name| format!(", which `{name}` needs")).unwrap_or_default()
}

/// A module's name as it is compared: of a file or a path to one, without its extensions, `_` for `-`.
pub fn normal_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or_default();
    let stem = ["", ".xz", ".zst", ".gz"]
        .iter()
        .find_map(|compression| file.strip_suffix(compression)?.strip_suffix(".ko"))
        .unwrap_or(file);
    stem.replace('-', "_")
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Module {
    /// Below the folder of modules: `kernel/fs/erofs/erofs.ko.xz`.
    path: String,
    /// Normal names of what must be loaded before.
    depends: Vec<String>,
    /// What it asks to be loaded before, where it is there; each a name or an alias.
    soft_depends: Vec<String>,
    aliases: Vec<String>,
    symbols: Vec<String>,
    /// Its place in the order in which modules were linked; of several that fit, the first is meant.
    order: u32,
}

/// The modules of one kernel.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Modules {
    /// By normal name.
    modules: BTreeMap<String, Module>,
    /// What is part of the kernel itself, by normal name.
    builtin: BTreeSet<String>,
    /// The aliases of what is part of the kernel itself, and its normal names.
    builtin_aliases: Vec<(String, String)>,
}

impl Modules {
    /// Modules from the text of `modules.dep` and `modules.builtin`.
    ///
    /// # Errors
    /// [`ModulesError::Malformed`].
    pub fn from_dep(dep: &str, builtin: &str) -> Result<Self, ModulesError> {
        let mut modules = BTreeMap::new();
        for (number, line) in dep.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let (path, depends) = line.split_once(':').ok_or(ModulesError::Malformed { line: number + 1 })?;
            let module = Module {
                path: path.trim().to_owned(),
                depends: depends.split_ascii_whitespace().map(normal_name).collect(),
                order: u32::try_from(number).unwrap_or(u32::MAX),
                ..Module::default()
            };
            modules.insert(normal_name(&module.path), module);
        }
        Ok(Self { modules, builtin: names(builtin), builtin_aliases: Vec::new() })
    }

    /// Modules from what each says of itself, by path below the folder of modules, and the contents of
    /// `modules.order`, `modules.builtin` and `modules.builtin.modinfo`.
    pub fn from_infos(
        infos: impl IntoIterator<Item = (String, ModuleInfo)>,
        order: &str,
        builtin: &str,
        builtin_modinfo: &[u8],
    ) -> Self {
        let places: BTreeMap<String, u32> =
            (0..).zip(order.lines()).map(|(n, line)| (normal_name(line), n)).collect();
        let modules = infos.into_iter().map(|(path, info)| {
            let name = normal_name(&path);
            let module = Module {
                order: places.get(&name).copied().unwrap_or(u32::MAX),
                path,
                depends: info.depends.iter().map(|name| normal_name(name)).collect(),
                soft_depends: info.soft_depends,
                aliases: info.aliases,
                symbols: info.symbols,
            };
            (name, module)
        });
        Self {
            modules: modules.collect(),
            builtin: names(builtin),
            builtin_aliases: info::builtin_aliases(builtin_modinfo),
        }
    }

    /// How many modules there are that can be loaded.
    pub fn len(&self) -> usize {
        self.modules.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.modules.is_empty()
    }

    /// Whether `name` is part of the kernel itself.
    pub fn is_builtin(&self, name: &str) -> bool {
        self.builtin.contains(&normal_name(name))
    }

    /// The files to load for the modules `wanted`, by path below the folder of modules: each once, after all
    /// that it needs. What is built in is left out.
    ///
    /// # Errors
    /// [`ModulesError::Unknown`] and [`ModulesError::Cycle`].
    pub fn load_order<'a>(&'a self, wanted: &[&str]) -> Result<Vec<&'a str>, ModulesError> {
        let mut walk = Walk { modules: self, loaded: BTreeSet::new(), open: Vec::new(), order: Vec::new() };
        for name in wanted {
            walk.load(&normal_name(name), None, true)?;
        }
        Ok(walk.order.iter().map(|module| module.path.as_str()).collect())
    }

    /// What must be loaded before the module `name`, soft dependencies left aside, in that order.
    fn dependencies(&self, name: &str) -> Result<Vec<&Module>, ModulesError> {
        let mut walk = Walk { modules: self, loaded: BTreeSet::new(), open: Vec::new(), order: Vec::new() };
        walk.load(name, None, false)?;
        walk.order.pop();
        Ok(walk.order)
    }

    /// The modules that `name_or_alias` stands for; none where the kernel itself answers to it.
    fn standing_for(&self, name_or_alias: &str) -> Vec<String> {
        let name = normal_name(name_or_alias);
        if self.builtin.contains(&name) || self.builtin_aliases.iter().any(|(alias, _)| *alias == name) {
            return Vec::new();
        }
        if self.modules.contains_key(&name) {
            return vec![name];
        }
        let has_alias = |module: &Module| module.aliases.iter().any(|alias| alias.replace('-', "_") == name);
        self.modules.iter().filter(|(_, module)| has_alias(module)).map(|(name, _)| name.clone()).collect()
    }
}

fn names(paths: &str) -> BTreeSet<String> {
    paths.lines().map(str::trim).filter(|path| !path.is_empty()).map(normal_name).collect()
}

/// A walk over what modules need, deepest first.
struct Walk<'a> {
    modules: &'a Modules,
    loaded: BTreeSet<String>,
    /// From the module asked for to the one at hand.
    open: Vec<String>,
    order: Vec<&'a Module>,
}

impl Walk<'_> {
    fn load(&mut self, name: &str, needed_by: Option<&str>, with_soft: bool) -> Result<(), ModulesError> {
        if self.loaded.contains(name) {
            return Ok(());
        }
        let Some(module) = self.modules.modules.get(name) else {
            if self.modules.builtin.contains(name) {
                return Ok(());
            }
            return Err(ModulesError::Unknown {
                name: name.to_owned(),
                needed_by: needed_by.map(ToOwned::to_owned),
            });
        };
        if self.open.iter().any(|open| open == name) {
            return Err(ModulesError::Cycle { name: name.to_owned() });
        }
        self.open.push(name.to_owned());
        for dependency in &module.depends {
            self.load(dependency, Some(name), with_soft)?;
        }
        if with_soft {
            for soft in &module.soft_depends {
                for candidate in self.modules.standing_for(soft) {
                    // A wish that leads back here, or to what is missing, is not granted.
                    if !self.open.contains(&candidate) {
                        let _ = self.load(&candidate, Some(name), true);
                    }
                }
            }
        }
        self.open.pop();
        self.loaded.insert(name.to_owned());
        self.order.push(module);
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! Modules for the tests of others.

    /// A module whose section `.modinfo` is `modinfo`.
    pub(crate) fn module(modinfo: &[u8]) -> Vec<u8> {
        super::info::tests::module(modinfo, &[])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "\
kernel/fs/erofs/erofs.ko.xz: kernel/lib/libcrc32c.ko.xz kernel/fs/netfs.ko.xz
kernel/lib/libcrc32c.ko.xz:
kernel/fs/netfs.ko.xz: kernel/lib/libcrc32c.ko.xz
kernel/drivers/block/virtio_blk.ko.xz:
kernel/net/vmw_vsock/vmw-vsock-x.ko.xz: kernel/net/vsock.ko.xz
kernel/net/vsock.ko.xz:
";

    #[test]
    fn files_come_after_what_they_need_and_builtins_are_left_out() {
        let modules = Modules::from_dep(DEP, "kernel/fs/fuse/fuse.ko\n").expect("modules");
        let order =
            modules.load_order(&["virtio-blk", "erofs", "fuse", "netfs", "vmw_vsock_x"]).expect("an order");
        assert_eq!(
            order,
            [
                "kernel/drivers/block/virtio_blk.ko.xz",
                "kernel/lib/libcrc32c.ko.xz",
                "kernel/fs/netfs.ko.xz",
                "kernel/fs/erofs/erofs.ko.xz",
                "kernel/net/vsock.ko.xz",
                "kernel/net/vmw_vsock/vmw-vsock-x.ko.xz"
            ]
        );
        assert!(modules.is_builtin("fuse") && !modules.is_builtin("erofs"));
    }

    #[test]
    fn unknown_modules_and_cycles_are_errors() {
        let modules = Modules::from_dep("a.ko: b.ko\nb.ko: a.ko\nc.ko: d.ko\n", "").expect("modules");
        assert_eq!(modules.load_order(&["a"]), Err(ModulesError::Cycle { name: "a".into() }));
        let error = modules.load_order(&["c"]).expect_err("no d");
        assert_eq!(error.to_string(), "the kernel has no module `d`, which `c` needs");
        assert!(modules.load_order(&["none"]).is_err());
        assert_eq!(Modules::from_dep("\nno colon\n", ""), Err(ModulesError::Malformed { line: 2 }));
    }

    #[test]
    fn soft_dependencies_are_loaded_where_they_are_there() {
        let info = |depends: &[&str], soft: &[&str], aliases: &[&str]| ModuleInfo {
            depends: depends.iter().map(ToString::to_string).collect(),
            soft_depends: soft.iter().map(ToString::to_string).collect(),
            aliases: aliases.iter().map(ToString::to_string).collect(),
            symbols: vec![],
        };
        let modules = Modules::from_infos(
            [
                ("kernel/libcrc32c.ko".to_owned(), info(&[], &["crc32c", "missing"], &[])),
                ("kernel/crc32c_generic.ko".to_owned(), info(&[], &["libcrc32c"], &["crc32c"])),
                ("kernel/xfs.ko".to_owned(), info(&["libcrc32c"], &[], &[])),
            ],
            "",
            "kernel/sha.ko\n",
            b"",
        );
        let order = modules.load_order(&["xfs"]).expect("an order");
        assert_eq!(order, ["kernel/crc32c_generic.ko", "kernel/libcrc32c.ko", "kernel/xfs.ko"]);
        let builtin = b"sha.license=GPL\0sha.alias=crc32c\0junk\0";
        let infos = [
            ("kernel/libcrc32c.ko".to_owned(), info(&[], &["crc32c"], &[])),
            ("kernel/crc32c_intel.ko".to_owned(), info(&[], &[], &["crc32c"])),
        ];
        let modules = Modules::from_infos(infos, "", "kernel/sha.ko\n", builtin);
        assert_eq!(modules.load_order(&["libcrc32c"]).expect("an order"), ["kernel/libcrc32c.ko"]);
    }
}
