//! `kiln boot`: a system on real firmware, and what it should print.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use kiln_artifact::fat::Label;

use super::choice::Choice;
use super::show::{Narrator, line};
use super::{CANNOT, FAILED, Failure, USAGE};
use crate::boot::firmware::{Firmware, SecureBoot};
use crate::boot::trial::{Outcome, What};
use crate::boot::{Boot, BootError, DiskChoice, SshChoice, Told, Verdict, boot, check, find_tpm, report};
use crate::engine::{Boundary, Host};
use crate::machine::qemu::firmware::{Bus, Format};
use crate::plan::script::{self, ScriptError, Statement};
use crate::plan::{MEMORY_BYTES, harmless, parse_bytes, show_duration, without_commands};
use crate::sign::close_process;

/// How a disk may be attached.
const BUSES: [(&str, Bus); 4] =
    [("virtio", Bus::Virtio), ("nvme", Bus::Nvme), ("usb", Bus::Usb), ("sata", Bus::Sata)];

/// Arguments of `kiln boot`.
#[derive(Debug, Args)]
#[command(after_help = "\
Statements of a script, one a line (-e) or in a file (--script):
  expect TEXT, expect /REGEX/   the serial console prints it, after what was matched last
  reject TEXT, reject /REGEX/   from here on it does not; where no statement that waits follows, this is watched for
                                the time of `within`, or until the guest switches its machine off
  send TEXT                     types TEXT and Return; in quotes exactly what is there (\\n \\r \\t \\e \\xNN)
  within TIME                   how long each statement that follows may wait (2m until said otherwise)
  reboot, poweroff              the guest restarts its machine, or switches it off
  ssh COMMAND, ssh=N COMMAND    it ends in the guest with status 0, or with N
  output TEXT, output /REGEX/   the last command over ssh printed it
  screenshot NAME               takes a picture of the screen, into NAME.png of the report

Examples:
  kiln boot disk.img                                        watch it boot, until it switches itself off
  kiln boot out/boot/efi --secure-boot keys -e 'within 60s' -e 'expect login:'
  kiln boot linux.efi --secure-boot setup --script boot.txt --report out --junit out/junit.xml
  kiln boot disk.img --secure-boot vendor -e 'within 5m' -e 'expect login:'
  kiln boot linux.efi --enroll keys --vars vars.fd -e 'within 60s' -e 'expect login:'
  kiln boot disk.img --bus nvme --tpm --ssh-key id_ed25519 -e 'ssh systemctl is-system-running' -e 'output running'

Exit codes: 0 as the script wants it (without one: it ended), 1 not, 2 usage, 3 this host cannot do it.")]
pub(super) struct BootArguments {
    /// A disk image (raw, also of a CD; qcow2 with --format), a folder that goes onto a FAT disk, or an EFI program such
    /// as a UKI
    #[arg(value_name = "IMAGE|DIR|UKI")]
    image: PathBuf,
    /// How the disk is attached
    #[arg(long, value_name = "BUS", default_value = "virtio", value_parser = Choice(&["virtio", "nvme", "usb", "sata"]))]
    bus: String,
    /// How the image's bytes are read
    #[arg(long, value_name = "FORMAT", value_parser = Choice(&["raw", "qcow2"]))]
    format: Option<String>,
    /// Name of the FAT partition of a folder, such as the BOOTA that initOS looks for [default: KILN]
    #[arg(long, value_name = "LABEL")]
    label: Option<String>,
    /// Let what the guest writes stay in the image, instead of dropping it
    #[arg(long)]
    keep_writes: bool,
    /// A further disk, attached as --bus says unless BUS is given
    #[arg(long = "disk", value_name = "FILE[:BUS]")]
    disks: Vec<String>,
    /// Secure Boot: `off`, `setup` (on, without keys), `vendor` (with the keys that machines are sold with), or a folder with PK, KEK and db, and dbx where it is there (.esl, .cer, .crt)
    #[arg(long, value_name = "off|setup|vendor|DIR", default_value = "off")]
    secure_boot: String,
    /// Let the firmware, in setup mode, take PK.auth, KEK.auth and db.auth of DIR before the image is booted
    #[arg(long, value_name = "DIR")]
    enroll: Option<PathBuf>,
    /// Keep the firmware's variables in FILE between runs; it is made where it is not there, and else has its own keys
    #[arg(long, value_name = "FILE")]
    vars: Option<PathBuf>,
    /// Firmware to use instead of the host's; it has Secure Boot if --secure-boot says so
    #[arg(long, value_name = "CODE.fd", requires = "firmware_vars")]
    firmware: Option<PathBuf>,
    /// The variable store that comes with it; it is copied for each run
    #[arg(long, value_name = "VARS.fd", requires = "firmware")]
    firmware_vars: Option<PathBuf>,
    /// A TPM 2.0, new in each run (swtpm)
    #[arg(long)]
    tpm: bool,
    /// Memory of the machine
    #[arg(long, value_name = "SIZE", default_value = "1G")]
    memory: String,
    /// Processors of the machine; without it 2, and where they are emulated 1
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    cpus: Option<u16>,
    /// Let the guest reach the host's network
    #[arg(long)]
    network: bool,
    /// One statement; may be repeated
    #[arg(short = 'e', value_name = "STATEMENT", conflicts_with = "script")]
    statements: Vec<String>,
    /// A file of statements
    #[arg(long, value_name = "FILE")]
    script: Option<PathBuf>,
    /// The private key for `ssh`
    #[arg(long, value_name = "FILE")]
    ssh_key: Option<PathBuf>,
    /// Who it is for
    #[arg(long, value_name = "NAME", default_value = "root")]
    ssh_user: String,
    /// The guest's public host key; without it the first that is shown counts for the run
    #[arg(long, value_name = "FILE", requires = "ssh_key")]
    ssh_host_key: Option<PathBuf>,
    /// Write the console, a timeline and a picture of the screen at each verdict to this folder
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    /// Write what was judged as JUnit XML
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Do not print what the guest prints
    #[arg(short, long)]
    quiet: bool,
}

impl From<ScriptError> for Failure {
    fn from(error: ScriptError) -> Self {
        Self::new(&error, None, USAGE)
    }
}

impl From<BootError> for Failure {
    fn from(error: BootError) -> Self {
        let code = match &error {
            error if error.is_the_hosts() => CANNOT,
            error if error.is_the_users() => USAGE,
            _ => FAILED,
        };
        let hint = error.hint();
        Self::new(&error, hint, code)
    }
}

fn usage(text: String) -> Failure {
    Failure { text, hint: None, code: USAGE }
}

/// What is asked for, before anything of the host is looked at.
pub(super) fn read(arguments: &BootArguments) -> Result<Boot, Failure> {
    let bus = bus(&arguments.bus)?;
    let format = match arguments.format.as_deref() {
        None => None,
        Some("raw") => Some(Format::Raw),
        Some("qcow2") => Some(Format::Qcow2),
        Some(other) => return Err(usage(format!("--format is raw or qcow2, not `{other}`"))),
    };
    let keep_writes = arguments.keep_writes;
    let label = arguments.label.as_ref().map(|text| {
        Label::new(text)
            .ok_or_else(|| usage(format!("FAT cannot hold the label `{text}`: eleven letters at most")))
    });
    let label = label.transpose()?;
    let mut disks = vec![DiskChoice { path: arguments.image.clone(), format, bus, keep_writes, label }];
    for text in &arguments.disks {
        let (path, bus) = match text.rsplit_once(':') {
            Some((path, word)) => (path, self::bus(word)?),
            None => (text.as_str(), bus),
        };
        disks.push(DiskChoice { path: path.into(), format: None, bus, keep_writes, label });
    }
    let memory_bytes = parse_bytes(&arguments.memory)
        .map_err(|_| usage(format!("--memory is a size such as 512M, not `{}`", arguments.memory)))?;
    if !MEMORY_BYTES.contains(&memory_bytes) {
        return Err(usage(format!(
            "--memory is at least 128M and at most 8T, and not `{}`",
            arguments.memory
        )));
    }
    let secure_boot = match (arguments.secure_boot.as_str(), &arguments.enroll) {
        ("off" | "setup", Some(folder)) => SecureBoot::Enrol(folder.clone()),
        (_, Some(_)) => {
            return Err(usage("with --enroll, the keys of --secure-boot would be there before".to_owned()));
        }
        ("off", None) => SecureBoot::Off,
        ("setup", None) => SecureBoot::Setup,
        ("vendor", None) => SecureBoot::Vendor,
        (folder, None) => SecureBoot::Keys(folder.into()),
    };
    let firmware = arguments
        .firmware
        .clone()
        .zip(arguments.firmware_vars.clone())
        .map(|(code, vars)| Firmware { code, vars, smm: secure_boot != SecureBoot::Off });
    if arguments.ssh_key.is_some() {
        close_process();
    }
    let ssh = arguments.ssh_key.clone().map(|key| SshChoice {
        user: arguments.ssh_user.clone(),
        key,
        host_key: arguments.ssh_host_key.clone(),
    });
    Ok(Boot {
        disks,
        secure_boot,
        firmware,
        vars: arguments.vars.clone(),
        tpm: None,
        memory_bytes,
        cpus: arguments.cpus,
        network: arguments.network,
        ssh,
        script: script_of(arguments)?,
        report: arguments.report.clone(),
        scratch: PathBuf::new(),
    })
}

fn bus(word: &str) -> Result<Bus, Failure> {
    let known = BUSES.iter().find(|(name, _)| *name == word);
    known
        .map(|(_, bus)| *bus)
        .ok_or_else(|| usage(format!("a bus is virtio, nvme, usb or sata, not `{word}`")))
}

fn script_of(arguments: &BootArguments) -> Result<Vec<Statement>, Failure> {
    let mut all = Vec::new();
    for (index, text) in arguments.statements.iter().enumerate() {
        all.extend(script::parse(&format!("-e {},", index + 1), text)?);
    }
    if let Some(path) = &arguments.script {
        let text = fs::read_to_string(path)
            .map_err(|error| usage(format!("cannot read {}: {error}", path.display())))?;
        all.extend(script::parse(&path.display().to_string(), &text)?);
    }
    Ok(all)
}

/// Boots, says what happens, and whether it was as wanted. The report of what was judged is written however that ends.
pub(super) fn run(arguments: &BootArguments, mut wanted: Boot, host: &Host) -> Result<ExitCode, Failure> {
    let mut narrator = Narrator::new(false);
    let (verdict, failure) = match observe(arguments, &mut wanted, host, &mut narrator) {
        Ok(verdict) => {
            let failure = failed(&verdict.outcome, &wanted.script, wanted.report.as_deref());
            (Some(verdict), failure)
        }
        Err(failure) => (None, Some(failure)),
    };
    if let Some(path) = &arguments.junit {
        let name = arguments.image.display().to_string();
        let xml = xml(&name, &wanted.script, verdict.as_ref(), failure.as_ref());
        if let Err(error) = fs::write(path, xml) {
            let text = format!("cannot write {}: {error}", path.display());
            if failure.is_none() {
                return Err(Failure { text, hint: None, code: FAILED });
            }
            narrator.warn(&text);
        }
    }
    if let Some(failure) = failure {
        return Err(failure);
    }
    if let Some(Verdict { outcome: Outcome::Met, total, .. }) = verdict {
        narrator.say(&format!("as the script wants it, in {}", show_duration(total)));
    }
    Ok(ExitCode::SUCCESS)
}

/// Boots, and says what happens.
fn observe(
    arguments: &BootArguments,
    wanted: &mut Boot,
    host: &Host,
    narrator: &mut Narrator,
) -> Result<Verdict, Failure> {
    check(wanted, &host.settings.secrets.value)?;
    let qemu = host.backend(&Boundary::default())?;
    if arguments.tpm {
        wanted.tpm = Some(find_tpm(&host.settings.search_path)?);
    }
    wanted.scratch = host.store.temporary();
    let (wanted, quiet) = (&*wanted, arguments.quiet);
    let verdict = boot(&qemu, wanted, &mut |told| match told {
        Told::Started(identity) => {
            let network = if wanted.network { "; the guest has the host's network" } else { "" };
            narrator.say(&format!("{identity}{network}"));
        }
        Told::Warning(text) => narrator.warn(&text),
        Told::Note(text) => narrator.say(&text),
        Told::Moment(moment) => {
            let at = moment.at.as_secs_f64();
            match &moment.what {
                What::Line(text) if !quiet => {
                    line(&format!("[{at:8.3}] {}", without_commands(&harmless(text))));
                }
                What::Output(text) if !quiet => {
                    line(&format!("[{at:8.3}] ssh: {}", without_commands(&harmless(text))));
                }
                What::Line(_) | What::Output(_) => {}
                What::HostKey(key) => narrator.say(&format!("{at:.3} s: the guest's host key is {key}")),
                What::Reset => narrator.say(&format!("{at:.3} s: the guest restarted its machine")),
                What::PowerOff => narrator.say(&format!("{at:.3} s: the guest switched its machine off")),
                What::Verdict { index, failure: None, .. } => {
                    let text = wanted.script.get(*index).map_or("", |statement| &statement.text);
                    narrator.say(&format!("{at:.3} s: met: {text}"));
                }
                // Told as the error that it is.
                What::Verdict { .. } => {}
            }
        }
    })?;
    Ok(verdict)
}

/// Why it is not as wanted, where it is not.
fn failed(outcome: &Outcome, script: &[Statement], report: Option<&Path>) -> Option<Failure> {
    let (text, hint) = match outcome {
        Outcome::Met | Outcome::Over => return None,
        Outcome::Died(text) => (text.clone(), None),
        Outcome::Mute(text) => {
            let hint = match report {
                Some(folder) => format!("what is on the screen is in {}", folder.join("end.png").display()),
                None => "there may be more on the screen: --report DIR takes a picture of it".to_owned(),
            };
            (text.clone(), Some(hint))
        }
        Outcome::NotMet { index, why } => {
            let statement = script.get(*index);
            let (place, text) = statement.map_or(("", ""), |s| (s.place.as_str(), s.text.as_str()));
            (format!("{place} `{text}`: {why}"), None)
        }
    };
    Some(Failure { text, hint, code: FAILED })
}

/// What was judged as JUnit XML, with a failure that is none of a statement's.
fn xml(name: &str, script: &[Statement], verdict: Option<&Verdict>, failure: Option<&Failure>) -> String {
    let seen = verdict.map(|verdict| (verdict.moments.as_slice(), verdict.total));
    let (moments, total) = seen.unwrap_or_default();
    let is_a_statements = verdict.is_some_and(|verdict| matches!(verdict.outcome, Outcome::NotMet { .. }));
    match failure {
        Some(failure) if !is_a_statements => {
            report::junit_of_error(name, script, moments, total, &failure.text)
        }
        _ => report::junit(name, script, moments, total),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::boot::trial::Moment;

    /// The report of a trial that went so.
    fn report_of(outcome: Outcome) -> (String, Option<Failure>) {
        let script = script::parse("s", "expect a").expect("a good script");
        let moments = match &outcome {
            Outcome::NotMet { index, why } => {
                let (failure, took) = (Some(why.clone()), Duration::ZERO);
                vec![Moment { at: took, what: What::Verdict { index: *index, failure, took } }]
            }
            _ => Vec::new(),
        };
        let failure = failed(&outcome, &script, None);
        let verdict = Verdict { outcome, moments, total: Duration::from_secs(1) };
        (xml("disk.img", &script, Some(&verdict), failure.as_ref()), failure)
    }

    #[test]
    fn what_fails_and_is_no_statements_fault_is_an_error_of_the_report() {
        let words = || "what was seen of it".to_owned();
        for outcome in [Outcome::Mute(words()), Outcome::Died(words())] {
            let (xml, failure) = report_of(outcome);
            assert_eq!(failure.map(|failure| (failure.text, failure.code)), Some((words(), FAILED)));
            assert!(xml.contains("failures=\"0\" errors=\"1\"") && xml.contains(&words()), "{xml}");
        }
        let nothing_judged = xml("disk.img", &[], None, Some(&usage(words())));
        assert!(nothing_judged.contains("tests=\"1\" failures=\"0\" errors=\"1\""), "{nothing_judged}");
        let (xml, failure) = report_of(Outcome::NotMet { index: 0, why: words() });
        assert!(xml.contains("tests=\"1\" failures=\"1\" errors=\"0\""), "{xml}");
        assert!(failure.is_some_and(|failure| failure.text == "s line 1 `expect a`: what was seen of it"));
        for outcome in [Outcome::Met, Outcome::Over] {
            let (xml, failure) = report_of(outcome);
            assert!(xml.contains("failures=\"0\" errors=\"0\"") && failure.is_none(), "{xml}");
        }
    }
}
