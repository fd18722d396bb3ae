//! What depmod(8) writes into a folder of modules, so that modprobe works there.

use super::trie::Index;
use super::{Modules, ModulesError};

impl Modules {
    /// The files `modules.*` that depmod would add to the folder of modules: name and content.
    ///
    /// # Errors
    /// [`ModulesError`] where modules need what is missing or each other.
    pub fn depmod_files(&self) -> Result<Vec<(&'static str, Vec<u8>)>, ModulesError> {
        let (mut dep, mut dep_index) = (String::new(), Index::default());
        let (mut alias, mut alias_index) =
            (String::from("# Aliases extracted from modules themselves.\n"), Index::default());
        let mut symbol = String::from("# Aliases for symbols, used by symbol_request().\n");
        let mut symbol_index = Index::default();
        let mut soft = String::from("# Soft dependencies extracted from modules themselves.\n");
        let mut builtin_index = Index::default();
        for (name, module) in &self.modules {
            let mut line = format!("{}:", module.path);
            // What is loaded first stands last.
            for dependency in self.dependencies(name)?.iter().rev() {
                line.push(' ');
                line.push_str(&dependency.path);
            }
            dep_index.insert(name, &line, module.order);
            dep.push_str(&line);
            dep.push('\n');
            for pattern in &module.aliases {
                alias.push_str(&format!("alias {pattern} {name}\n"));
                alias_index.insert(&normal_alias(pattern), name, module.order);
            }
            for exported in &module.symbols {
                symbol.push_str(&format!("alias symbol:{exported} {name}\n"));
                symbol_index.insert(&format!("symbol:{exported}"), name, module.order);
            }
            if !module.soft_depends.is_empty() {
                soft.push_str(&format!("softdep {name} pre: {}\n", module.soft_depends.join(" ")));
            }
        }
        for name in &self.builtin {
            builtin_index.insert(name, "", 0);
        }
        let mut builtin_alias_index = Index::default();
        for (pattern, name) in &self.builtin_aliases {
            builtin_alias_index.insert(pattern, name, 0);
        }
        Ok(vec![
            ("modules.dep", dep.into_bytes()),
            ("modules.dep.bin", dep_index.to_bytes()),
            ("modules.alias", alias.into_bytes()),
            ("modules.alias.bin", alias_index.to_bytes()),
            ("modules.symbols", symbol.into_bytes()),
            ("modules.symbols.bin", symbol_index.to_bytes()),
            ("modules.softdep", soft.into_bytes()),
            ("modules.builtin.bin", builtin_index.to_bytes()),
            ("modules.builtin.alias.bin", builtin_alias_index.to_bytes()),
        ])
    }
}

/// An alias as modprobe looks for it: `_` for `-`, except within brackets.
pub(super) fn normal_alias(alias: &str) -> String {
    let mut is_inside = false;
    let normal = alias.chars().map(|letter| {
        match letter {
            '[' => is_inside = true,
            ']' => is_inside = false,
            _ => {}
        }
        if letter == '-' && !is_inside { '_' } else { letter }
    });
    normal.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_listed_with_the_first_to_load_last() {
        let modules = Modules::from_dep("c.ko: b.ko\nb.ko: a.ko\na.ko:\n", "kernel/x.ko\n").expect("modules");
        let files = modules.depmod_files().expect("files");
        let dep = files.iter().find(|(name, _)| *name == "modules.dep").expect("there");
        assert_eq!(String::from_utf8_lossy(&dep.1), "a.ko:\nb.ko: a.ko\nc.ko: b.ko a.ko\n");
    }

    #[test]
    fn aliases_are_normalised_outside_brackets() {
        assert_eq!(normal_alias("fs-a[0-9]-b"), "fs_a[0-9]_b");
    }
}
