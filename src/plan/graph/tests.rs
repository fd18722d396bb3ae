use super::*;

fn plan(text: &str) -> Result<Plan, Fault> {
    let recipe = Recipe::parse(text, "kiln.toml")?;
    Plan::of(&recipe, text, "kiln.toml")
}

fn names(plan: &Plan, wanted: &BTreeSet<StepId>) -> Vec<String> {
    wanted.iter().map(|id| plan.step(*id).name.clone()).collect()
}

#[test]
fn steps_come_after_what_they_need_and_targets_take_no_more_than_that() {
    let plan = plan(
        "[steps.a]\nneeds = [\"b\", \"c\"]\nrun = \"x\"\n[steps.b]\nneeds = [\"c\"]\nrun = \"x\"\n\
         [steps.c]\nrun = \"x\"\n[steps.d]\nrun = \"x\"\n[targets]\nall = [\"b\", \"d\"]\n",
    )
    .expect("good");
    for (index, step) in plan.steps.iter().enumerate() {
        assert!(step.needs.iter().all(|need| need.0 < index), "{}", step.name);
    }
    let wanted =
        |names: &[&str]| plan.wanted(&names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
    assert_eq!(names(&plan, &wanted(&["b"]).expect("known")), ["c", "b"]);
    assert_eq!(wanted(&["all"]).expect("known").len(), 3);
    assert_eq!(wanted(&[]).expect("known").len(), 4);
    let error = wanted(&["al"]).expect_err("unknown");
    assert_eq!(error.meant.as_deref(), Some("all"));
}

#[test]
fn a_circle_is_named_in_full_where_it_closes() {
    let fault = plan(
        "[steps.a]\nneeds = [\"b\"]\nrun = \"x\"\n[steps.b]\nneeds = [\"c\"]\nrun = \"x\"\n\
         [steps.c]\nneeds = [\"a\"]\nrun = \"x\"\n",
    )
    .expect_err("a circle");
    assert!(fault.message.contains("`a` needs `b` needs `c` needs `a`"), "{fault}");
    assert_eq!((fault.line, fault.column), (8, 10));
    let fault = plan("[steps.a]\nneeds = [\"a\"]\nrun = \"x\"\n").expect_err("a circle");
    assert!(fault.message.contains("`a` needs `a`"), "{fault}");
}

#[test]
fn what_contradicts_itself_is_refused_where_it_stands() {
    let step = |more: &str| format!("[steps.a]\nrun = \"x\"\n{more}\n");
    let two =
        |one: &str, other: &str| format!("[steps.a]\nrun = \"x\"\n{one}\n[steps.b]\nrun = \"x\"\n{other}\n");
    let boot = |more: &str| format!("[steps.a.boot]\nimage = \"x\"\n{more}\n");
    for (text, line, words) in [
        (step("untrusted = true\nnetwork = \"full\""), 1, "contradict each other"),
        (two("outputs = [\"bin\"]", "outputs = [\"bin/x\"]"), 6, "both put out"),
        (two("outputs = [\"*.o\"]", "outputs = [\"x.o\"]"), 6, "both put out"),
        (two("outputs = [\"x.o\"]", "outputs = [\"?.o\"]"), 6, "both put out"),
        (two("outputs = [\"{x,y}.o\"]", "outputs = [\"x.o\"]"), 6, "both put out"),
        (two("outputs = [\"[a-z].o\"]", "outputs = [\"x.o\"]"), 6, "both put out"),
        (two("outputs = [\"lib/x\"]", "inputs = [\"lib/*\"]"), 6, "does not need that step"),
        (step("outputs = [\"x\"]\ninputs = [\"x\"]"), 4, "its own input"),
        (step("outputs = [\"../x\"]"), 3, "escapes WORK"),
        (step("outputs = [\"/x\"]"), 3, "escapes WORK"),
        (step("outputs = [\"a[\"]"), 3, "not a glob"),
        (step("inputs = [\"a/../../b\"]"), 3, "escapes WORK"),
        (step("needs = [\"b\"]"), 3, "no step `b`"),
        (step("root = \"b\""), 3, "no root `b`"),
        (step("kernel = \"bzImage\""), 3, "write debian:SUITE, file:PATH or step:NAME"),
        (step("kernel = \"file:\""), 3, "write debian:SUITE, file:PATH or step:NAME"),
        (step("kernel = \"debian:trixie\"\nmodules = \"m\""), 4, "a kernel that is a file"),
        (step("modules = \"m\""), 3, "a kernel that is a file"),
        (step("root = \"live:/\""), 3, "live root"),
        (step("root = \"foo:x\""), 3, "names no root"),
        (step("script = \"x\""), 3, "both run and script"),
        (step("boot = { image = \"x\", expect = \"reboot\" }"), 3, "both run and boot"),
        (boot("expect = \"reboot\"\nscript = \"x\""), 4, "both expect and script"),
        (boot(""), 2, "does not say what the image should do"),
        (boot("expect = \"\""), 3, "nothing is expected"),
        (boot("expect = \"\"\"\nwithin 5s\nexspect x\n\"\"\""), 5, "`exspect` is no statement"),
        (boot("expect = \"within 5s\\nexspect x\""), 3, "`exspect` is no statement"),
        (boot("expect = \"output x\""), 3, "no command over ssh before it"),
        (boot("expect = \"screenshot x\""), 3, "needs a folder"),
        (boot("script = \"../x\""), 3, "no path in SRCDIR"),
        (boot("expect = \"reboot\"\nbus = \"scsi\""), 4, "no bus `scsi`"),
        (boot("expect = \"reboot\"\nlabel = \"twelve chars\""), 4, "FAT cannot hold"),
        (boot("expect = \"reboot\"\nsecure-boot = \"on\""), 4, "says nothing of Secure Boot"),
        (boot("expect = \"reboot\"\nsecure-boot = \"vendor\"\nkeys = \"K\""), 5, "the vendor's keys"),
        (boot("expect = \"reboot\"\nsecure-boot = \"keys\""), 4, "takes the keys of a folder"),
        (boot("expect = \"reboot\"\nkeys = \"k\""), 4, "has no keys"),
        (boot("expect = \"reboot\"\nreport = \".\""), 4, "one folder below WORK"),
        (boot("expect = \"reboot\"\nchange = [{ file = \"x\" }]"), 4, "says what changes"),
        (boot("expect = \"reboot\"\nchange = [{ flip = 1, text = \"\" }]"), 4, "says what changes"),
        (boot("expect = \"reboot\"\nchange = [{ text = \"\", section = \"s\" }]"), 4, "belongs to flip"),
        (boot("expect = \"reboot\"\nchange = [{ sign = \"me\" }]"), 4, "nobody is called `me`"),
        (step("limits = { memory = \"1K\" }"), 3, "too little"),
        (step("limits = { memory = \"0\" }"), 3, "too little"),
        (step("limits = { memory = \"18446744073709551615\" }"), 3, "8.0 TiB is the most"),
        (step("limits = { scratch = \"18446744073709551615\" }"), 3, "8.0 TiB is the most"),
        (step("limits = { timeout = \"soon\" }"), 3, "not a duration"),
        (step("limits = { cpus = 0 }"), 3, "1 to 64"),
        (step("sources = [\"x\"]"), 3, "no source `x`"),
        (step("kernel = \"linux\""), 3, "names no kernel"),
        ("[steps.a]\noutputs = [\"x\"]\n".to_owned(), 1, "does nothing"),
        ("[steps.a]\nscript = \"../x\"\n".to_owned(), 2, "no path in SRCDIR"),
        ("ignore = [\"a/../..\"]\n".to_owned(), 1, "leaves SRCDIR"),
        (step("[targets]\nt = [\"b\"]"), 4, "no step `b`"),
        (step("[targets]\na = [\"a\"]"), 4, "cannot be a target"),
        (step("[sources.x]\nurl = \"file:///etc/passwd\""), 4, "no URL of https or http"),
        (step("[sources.x]\nurl = \"http://a/b\"\nsha256 = \"12\""), 5, "not a SHA-256"),
        (step("[sources.x]\nurl = \"http://a/b\""), 4, "anybody on the way"),
        (step("[sources.x]\nurl = \"https://me:secret@a/b\""), 4, "has a user in it"),
        (step("[sources.x]\nurl = \"https://a/b c\""), 4, "no URL of https or http"),
        (step("[sources.x]\nurl = \"https://a/b\"\nmirrors = [\"http://c/b\"]"), 5, "anybody on the way"),
        (step("[sources.x]\nurl = \"https://a/b\"\nrev = \"v1\""), 5, "rev without git"),
        (step("[sources.x]\nsha256 = \"12\""), 4, "not a SHA-256"),
        (step("[sources.x]"), 3, "comes from nowhere"),
        (step("[sources.x]\ngit = \"https://a/b\""), 4, "which commit"),
        (step("[sources.x]\ngit = \"https://a/b\"\nurl = \"https://a/b\""), 4, "both url and git"),
        (
            step("[sources.x]\ngit = \"https://a/b\"\nrev = \"v1\"\nmirrors = [\"https://c\"]"),
            6,
            "mirrors without url",
        ),
        (step("[sources.x]\ngit = \"http://a/b\"\nrev = \"v1\""), 4, "anybody on the way"),
        (step("[sources.x]\ngit = \"git://a/b\"\nrev = \"v1\""), 4, "anybody on the way"),
        (step("[sources.x]\ngit = \"ext::sh -c id\"\nrev = \"v1\""), 4, "no URL of https, http or git"),
        (step("[sources.x]\ngit = \"ssh://a/b\"\nrev = \"v1\""), 4, "no URL of https, http or git"),
        (step("[sources.x]\ngit = \"--upload-pack=id\"\nrev = \"v1\""), 4, "no URL of https, http or git"),
        (
            step("[sources.x]\ngit = \"https://-oProxyCommand=id/b\"\nrev = \"v1\""),
            4,
            "no URL of https, http or git",
        ),
        (step("[sources.x]\ngit = \"file:///srv/r\"\nrev = \"v1\""), 4, "relative to the recipe"),
        (step("[sources.x]\ngit = \"https://a/b\"\nrev = \"--all\""), 5, "names no commit or tag"),
        (step("[sources.x]\ngit = \"https://a/b\"\nrev = \"v1..v2\""), 5, "names no commit or tag"),
        (step("[sources.x]\ngit = \"https://a/b\"\nrev = \"v1^{tree}\""), 5, "names no commit or tag"),
        (step("[sources.x]\ngit = \"https://a/b\"\nrev = \"12345ab\""), 5, "a part of a commit's id"),
        (step("[roots.r]\nfrom = \"dir:x\"\npackages = [\"gcc\"]"), 5, "takes no packages"),
        (step("[roots.r]\nfrom = \"dir:x\"\n[roots.s]\nfrom = \"dir:y\""), 1, "does not say which root"),
    ] {
        let fault = plan(&text).expect_err(&text);
        assert!(fault.message.contains(words), "{text}{fault}");
        assert_eq!(fault.line, line, "{text}{fault}");
    }
}

#[test]
fn a_root_is_put_together_of_its_packages() {
    let root = |text: &str| match &plan(text).expect("good").steps[0].root {
        Root::Spec(spec) => spec.to_string(),
        Root::Step(output) => format!("step:{}", output.shown),
    };
    let table =
        "[roots.r]\nfrom = \"debian:bookworm\"\npackages = [\"gcc\", \"g++\"]\n[steps.a]\nrun = \"x\"\n";
    assert_eq!(root(table), "debian:bookworm+gcc,g++");
    assert_eq!(root("[steps.a]\nrun = \"x\"\n"), DEFAULT_ROOT);
    assert_eq!(root("[steps.a]\nroot = \"dir:x\"\nrun = \"x\"\n"), "dir:x");
}

#[test]
fn a_name_to_be_ignored_is_meant_anywhere_and_a_path_from_the_top() {
    let plan = plan("ignore = [\".git\", \"*.o\", \"build/tmp\", \"/top\"]\n").expect("good");
    for hidden in ["x/.git", ".git", "a/b.o", "build/tmp", "top"] {
        assert!(plan.ignore.hides(hidden.as_bytes()), "{hidden}");
    }
    for shown in ["a/build/tmp", "a/top", ".github", "o"] {
        assert!(!plan.ignore.hides(shown.as_bytes()), "{shown}");
    }
}

#[test]
fn a_graph_of_ten_thousand_steps_in_a_row_is_no_recursion() {
    let mut text = String::new();
    for step in 0..10_000 {
        text += &format!("[steps.s{step}]\nrun = \"x\"\noutputs = [\"o/{step}\"]\n");
        if step > 0 {
            text += &format!("needs = [\"s{}\"]\n", step - 1);
        }
    }
    let plan = plan(&text).expect("good");
    assert_eq!(plan.steps.len(), 10_000);
}

#[test]
fn a_source_is_a_file_that_may_be_elsewhere_too_or_a_commit() {
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let text = format!(
        r#"
[sources.file]
url = "http://a/b"
mirrors = ["https://c/b", "http://d/b"]
sha256 = "{}"
[sources.here]
url = "http://127.0.0.1:8000/b"
[sources.tag]
git = "https://a/r.git"
rev = "v1.0"
[sources.commit]
git = "git://a/r.git"
rev = "{commit}"
[sources.near]
git = "file:../r"
rev = "release/1"
[steps.a]
run = "x"
sources = ["tag"]
"#,
        "7".repeat(64)
    );
    let plan = plan(&text).expect("good");
    assert_eq!(plan.steps[0].sources.len(), 1);
    let find = |name: &str| plan.sources.iter().find(|source| source.name == name).expect("a source");
    let SourceOrigin::Url { url, mirrors } = &find("file").origin else { panic!("a file") };
    assert_eq!((url.as_str(), mirrors.len()), ("http://a/b", 2));
    for (name, rev) in [("tag", "v1.0"), ("commit", commit), ("near", "release/1")] {
        assert!(matches!(&find(name).origin, SourceOrigin::Git { rev: found, .. } if found == rev), "{name}");
    }
}

#[test]
fn what_a_step_makes_is_what_it_puts_out() {
    let plan = plan(
        "[roots.k]\nfrom = 'deb:trixie'\npackages = ['linux-image-amd64']\n[steps.a]\nmake = [\
         { files = 'boot', from = [{ root = 'k', path = 'boot', only = ['vmlinuz-*'] }, { text = 'x', at = 'v' }] },\
         { squashfs = 'm-*.sqfs', from = [{ root = 'k', path = 'usr/lib/modules/*' }] }]\n\
         [steps.b]\nrun = 'x'\nkernel = 'step:a'\nroot = 'step:a/m.sqfs'\n",
    )
    .expect("good");
    let step = |name: &str| plan.step(plan.named(name).expect("there"));
    assert_eq!(step("a").outputs.globs().collect::<Vec<_>>(), ["boot/vmlinuz-*", "boot/v", "m-*.sqfs"]);
    assert_eq!(step("a").roots().count(), 2);
    assert_eq!(step("b").needs, [plan.named("a").expect("there")]);
    assert!(step("a").follows_outputs() && step("b").follows_outputs());
    assert_eq!(step("b").roots().count(), 0);
}

#[test]
fn what_cannot_be_made_is_refused_where_it_stands() {
    let make = |text: &str| format!("[steps.a]\nmake = [\n{text}\n]\n");
    for (text, line, words) in [
        (make("{ from = ['x'] }"), 1, "does not say what it makes"),
        (make("{ cpio = 'x', fat = 'y', from = ['z'] }"), 3, "not both cpio and fat"),
        (make("{ cpio = 'x' }"), 3, "nothing says what goes into `x`"),
        (make("{ cpio = '/x', from = ['y'] }"), 3, "is no path below it"),
        (make("{ cpio = 'x', from = ['a*b*'] }"), 3, "one `*`"),
        (make("{ cpio = 'x-*', from = ['y'], each = 'z' }"), 3, "ranges over"),
        (make("{ cpio = 'x', from = ['y'], compression = 'lz4' }"), 3, "no compression `lz4`"),
        (make("{ squashfs = 'x', from = ['y'], compression = 'gzip:12' }"), 3, "no compression `gzip:12`"),
        (make("{ squashfs = 'x', from = ['y'], block = '3K' }"), 3, "power of two"),
        (make("{ cpio = 'x', from = ['y'], label = 'L' }"), 3, "`label` belongs to fat"),
        (make("{ fat = 'x', from = ['y'], label = 'far too long a label' }"), 3, "cannot hold the name"),
        (make("{ cpio = 'x', from = [{ work = 'y', src = 'z' }] }"), 3, "comes from one of"),
        (make("{ cpio = 'x', from = [{ at = 'y' }] }"), 3, "where this comes from"),
        (make("{ cpio = 'x', from = [{ kiln = 'inti' }] }"), 3, "`inti`"),
        (make("{ cpio = 'x', from = [{ root = 'nope' }] }"), 3, "no root `nope`"),
        (make("{ cpio = 'x', from = [{ src = 'y', path = 'z' }] }"), 3, "`path` belongs to a root"),
        (make("{ cpio = 'x', from = [{ src = 'y', mode = '9' }] }"), 3, "octal"),
        (make("{ cpio = 'x', from = [{ src = 'y', join = true }] }"), 3, "need a place"),
        (make("{ uki = 'x', stub = 's', linux = 'l', cmdline = 'c' }"), 3, "takes initrd"),
        (
            "[steps.a]\nmake = { cpio = 'x', from = ['y'] }\noutputs = ['z']\n".to_owned(),
            3,
            "belongs to a step that runs",
        ),
        ("[steps.a]\nmake = { cpio = 'x', from = ['y'] }\nrun = 'z'\n".to_owned(), 1, "both run and make"),
        ("[steps.a]\nrun = 'z'\nkernel = 'step:b'\n".to_owned(), 3, "no step `b`"),
        ("[steps.a]\nrun = 'z'\nroot = 'step:a'\n".to_owned(), 3, "in a circle"),
    ] {
        let fault = plan(&text).expect_err(&text);
        assert!(fault.message.contains(words), "{text}{fault}");
        assert_eq!(fault.line, line, "{text}{fault}");
    }
}
