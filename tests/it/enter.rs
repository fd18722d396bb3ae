//! `kiln exec` and `kiln shell` by the name of a step or of a machine, as far as no machine has to start.

use std::fs;
use std::path::Path;

use kiln::keeper::{Entry, Registry};
use kiln::machine::jail::Held;
use kiln::machine::{Accelerator, Identity, Origin};

use super::host::Host;

/// A recipe with a step of this name.
fn recipe(host: &Host, step: &str) {
    host.file("kiln.toml", format!("[roots.b]\nfrom = \"dir:root\"\n[steps.{step}]\nrun = \"true\"\n"));
}

#[test]
fn a_name_of_nothing_is_told_with_what_there_is() {
    let host = Host::new();
    host.run(&["exec", "compil", "--", "true"]).fails(125, &["there is no machine `compil`"]);
    recipe(&host, "compile");
    for folder in ["", "below"] {
        fs::create_dir_all(host.path(folder)).expect("a folder");
        let mut kiln = host.kiln();
        let told =
            super::host::Told::by(kiln.current_dir(host.path(folder)).args(["exec", "compil", "--", "true"]));
        told.fails(2, &["`compil` is no machine and no step of the recipe"]).hints(&["`compile`"]);
    }
    host.file("kiln.toml", "steps = 1\n");
    host.run(&["exec", "compile", "--", "true"]).fails(2, &["kiln.toml"]);
}

#[test]
fn a_shell_needs_a_terminal_before_anything_is_built() {
    let host = Host::new();
    recipe(&host, "compile");
    host.run(&["shell", "compile"]).fails(2, &["not a terminal"]).hints(&["kiln exec NAME -- CMD"]);
    host.is_untouched();
}

#[test]
fn a_machine_is_preferred_to_a_step_of_its_name() {
    let host = Host::new();
    let store = host.path("store");
    kiln::store::Store::open(&store).expect("a store");
    let identity = Identity {
        backend: "fake".into(),
        accelerator: Accelerator::Tcg,
        jail: Held::default(),
        origin: Origin::Boot,
    };
    let entry = Entry::running("run", &[b"make".to_vec()], 1 << 30, 1, &identity);
    let registry = Registry::open(Path::new(&store.join("run"))).expect("a registry");
    let machine = registry.register(entry, || {}).expect("registered");
    let name = &machine.entry().name;
    recipe(&host, name);
    let told = host.run(&["exec", name, "--", "true"]);
    told.fails(
        125,
        &["its step still runs", "is a machine, and a step of the recipe too: this is the machine"],
    );
}
