//! From the tables of a recipe to steps: names resolved, quantities and globs read, an order found.

use std::collections::BTreeMap;
use std::ops::{Range, RangeInclusive};

use globset::GlobSetBuilder;

use super::{Command, DEFAULT_ROOT, Ignore, Kernel, Limits, Output, PlannedStep, Root, StepId};
use crate::plan::output::glob;
use crate::plan::recipe::{
    Expanded, Fault, LimitsTable, NetworkWord, Recipe, RootTable, StepTable, Text, nearest,
};
use crate::plan::{MEMORY_BYTES, Outputs, RootSpec, SCRATCH_BYTES, parse_bytes, parse_duration, show_bytes};

/// Of so many names at most all are told to whoever wrote another.
const MOST_NAMED: usize = 8;
/// Variables that say where a step finds what it works on.
const OWN_VARIABLES: [&str; 3] = ["WORK", "SRCDIR", "KILN_SOURCES"];

/// What names something that a step puts out begins with.
const STEP: &str = "step:";

/// The text of a root or kernel that a step puts out, and that step's name.
fn of_step(text: &Option<Text>) -> Option<(&Text, &str)> {
    let text = text.as_ref()?;
    let shown = text.get_ref().strip_prefix(STEP)?;
    Some((text, shown.split('/').next().unwrap_or(shown)))
}

/// A recipe being read.
pub(super) struct Reader<'a> {
    pub recipe: &'a Recipe,
    pub text: &'a str,
    pub file: &'a str,
}

impl Reader<'_> {
    pub fn fault(&self, span: Range<usize>, message: String) -> Fault {
        Fault::at(self.text, self.file, span, message)
    }

    pub fn unknown<'a>(&self, word: &Text, what: &str, known: impl Iterator<Item = &'a str>) -> Fault {
        let fault = self.fault(word.span(), format!("there is no {what} `{}`", word.get_ref()));
        let known: Vec<&str> = known.collect();
        match nearest(word.get_ref(), known.iter().copied()) {
            Some(meant) => fault.hint(format!("did you mean `{meant}`?")),
            None if (1..=MOST_NAMED).contains(&known.len()) => {
                fault.hint(format!("there is {}", known.join(", ")))
            }
            None => fault,
        }
    }

    /// Puts `steps` into an order in which each comes after all it needs, and says which those are.
    pub fn order(&self, steps: &mut Vec<Expanded<'_>>) -> Result<Vec<Vec<StepId>>, Fault> {
        let mut families: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for (index, step) in steps.iter().enumerate() {
            families.entry(step.family).or_default().push(index);
            if step.family != step.name {
                families.entry(&step.name).or_default().push(index);
            }
        }
        let mut needs: Vec<Vec<(usize, Range<usize>)>> = Vec::new();
        for step in steps.iter() {
            let mut found = Vec::new();
            for (text, name) in [&step.table.root, &step.table.kernel].into_iter().filter_map(of_step) {
                match families.get(name).map(Vec::as_slice) {
                    Some([id]) => found.push((*id, text.span())),
                    Some(_) => {
                        let message = format!("`{name}` is a matrix of steps, and just one is meant here");
                        return Err(self.fault(text.span(), message));
                    }
                    None => {
                        let known = families.keys().copied();
                        return Err(self.unknown(&Text::new(text.span(), name.to_owned()), "step", known));
                    }
                }
            }
            for need in &step.table.needs {
                let ids = families.get(need.get_ref().as_str());
                let ids = ids.ok_or_else(|| self.unknown(need, "step", families.keys().copied()))?;
                found.extend(ids.iter().map(|id| (*id, need.span())));
            }
            found.sort_by_key(|(id, _)| *id);
            found.dedup_by_key(|(id, _)| *id);
            needs.push(found);
        }
        drop(families);
        // Depth first, on a stack of its own: how deep a recipe goes is for its author to say.
        #[derive(Clone, Copy, PartialEq)]
        enum Mark {
            New,
            Open,
            Done,
        }
        let mut marks = vec![Mark::New; steps.len()];
        let mut order = Vec::new();
        for start in 0..steps.len() {
            if marks[start] != Mark::New {
                continue;
            }
            let mut path = vec![(start, 0)];
            marks[start] = Mark::Open;
            while let Some((at, next)) = path.last_mut() {
                let at = *at;
                let Some((need, span)) = needs[at].get(*next) else {
                    marks[at] = Mark::Done;
                    order.push(at);
                    path.pop();
                    continue;
                };
                *next += 1;
                match marks[*need] {
                    Mark::Done => {}
                    Mark::New => {
                        marks[*need] = Mark::Open;
                        path.push((*need, 0));
                    }
                    Mark::Open => {
                        let circle = path.iter().map(|(at, _)| *at).skip_while(|at| at != need);
                        let names: Vec<String> =
                            circle.chain([*need]).map(|at| format!("`{}`", steps[at].name)).collect();
                        let message = format!("steps need each other in a circle: {}", names.join(" needs "));
                        return Err(self.fault(span.clone(), message).hint("take one of these needs away"));
                    }
                }
            }
        }
        let mut places = vec![0; steps.len()];
        for (place, at) in order.iter().enumerate() {
            places[*at] = place;
        }
        let in_order = |at: &usize| {
            let mut ids: Vec<StepId> = needs[*at].iter().map(|(need, _)| StepId(places[*need])).collect();
            ids.sort_unstable();
            ids
        };
        let needs = order.iter().map(in_order).collect();
        let mut taken: Vec<Option<Expanded<'_>>> = steps.drain(..).map(Some).collect();
        steps.extend(order.iter().filter_map(|at| taken[*at].take()));
        Ok(needs)
    }

    pub fn ignore(&self) -> Result<Ignore, Fault> {
        let mut set = GlobSetBuilder::new();
        let mut globs = Vec::new();
        for text in &self.recipe.ignore {
            // As in other ignore files: a name without a slash is meant wherever it stands.
            let trimmed = text.get_ref().trim_end_matches('/');
            let anywhere = match trimmed.strip_prefix('/') {
                Some(from_top) => from_top.to_owned(),
                None if trimmed.contains('/') => trimmed.to_owned(),
                None => format!("**/{trimmed}"),
            };
            let bad = |why: String| {
                let message =
                    format!("`{}` is no glob of paths in SRCDIR: {why}", text.get_ref().escape_debug());
                self.fault(text.span(), message)
            };
            if trimmed.trim_start_matches('/').is_empty() || trimmed.split('/').any(|part| part == "..") {
                return Err(bad("it leaves SRCDIR, or is all of it".to_owned()));
            }
            set.add(glob(&anywhere).map_err(bad)?);
            globs.push(text.get_ref().clone());
        }
        let set = set.build().map_err(|error| self.fault(0..0, error.to_string()))?;
        Ok(Ignore { globs, set })
    }

    pub fn globs(&self, texts: &[Text]) -> Result<Outputs, Fault> {
        for text in texts {
            Outputs::parse([text.get_ref().as_str()])
                .map_err(|error| self.fault(text.span(), error.to_string()))?;
        }
        Outputs::parse(texts.iter().map(|text| text.get_ref().as_str()))
            .map_err(|error| self.fault(0..0, error.to_string()))
    }

    pub fn root_spec(&self, text: &str, span: Range<usize>) -> Result<RootSpec, Fault> {
        let spec = text.parse::<RootSpec>().map_err(|error| self.fault(span.clone(), error.to_string()))?;
        match spec {
            RootSpec::Live(_) => Err(self
                .fault(span, "a live root has no digest that a step could be known by".to_owned())
                .hint("import it: dir:PATH")),
            spec => Ok(spec),
        }
    }

    fn root(&self, step: &Expanded<'_>, names: &[&str]) -> Result<Root, Fault> {
        match of_step(&step.table.root) {
            Some((text, _)) => self.output(text, names).map(Root::Step),
            None => self.spec_of_root(step).map(Root::Spec),
        }
    }

    /// What `text`, `step:NAME` or `step:NAME/PATH`, names; `names` are those of the steps.
    fn output(&self, text: &Text, names: &[&str]) -> Result<Output, Fault> {
        let shown = text.get_ref().strip_prefix(STEP).unwrap_or_default();
        let (name, path) = shown.split_once('/').unwrap_or((shown, ""));
        let step = names.iter().position(|step| *step == name).map(StepId);
        let step = step.ok_or_else(|| self.unknown(text, "step", names.iter().copied()))?;
        if path.starts_with('/') || path.split('/').any(|part| part == "..") {
            let message = format!("`{path}` is no path of what step `{name}` puts out");
            return Err(self.fault(text.span(), message));
        }
        Ok(Output { step, shown: shown.to_owned(), path: path.trim_end_matches('/').to_owned() })
    }

    fn spec_of_root(&self, step: &Expanded<'_>) -> Result<RootSpec, Fault> {
        let roots = &self.recipe.roots;
        // Those that are only files no step means without saying so.
        let meant: Vec<_> =
            roots.iter().filter(|(_, table)| !table.from.get_ref().starts_with("deb:")).collect();
        let table = match &step.table.root {
            Some(text) => return self.root_named(text),
            None if meant.is_empty() => return self.root_spec(DEFAULT_ROOT, step.span.clone()),
            None if meant.len() > 1 => {
                let names: Vec<&str> = meant.iter().map(|(name, _)| name.get_ref().as_str()).collect();
                let message = format!("step `{}` does not say which root it has", step.name);
                return Err(self
                    .fault(step.span.clone(), message)
                    .hint(format!("root = one of {}", names.join(", "))));
            }
            None => match meant.first() {
                Some((_, found)) => found,
                None => return self.root_spec(DEFAULT_ROOT, step.span.clone()),
            },
        };
        self.named_root(table)
    }

    /// The root that `table` describes.
    pub fn named_root(&self, table: &RootTable) -> Result<RootSpec, Fault> {
        let from = table.from.get_ref();
        if table.packages.is_empty() {
            return self.root_spec(from, table.from.span());
        }
        if !from.starts_with("debian:") && !from.starts_with("deb:") {
            let message = format!("`{from}` takes no packages: only debian: and deb: do");
            return Err(self.fault(table.packages[0].span(), message));
        }
        let names: Vec<&str> = table.packages.iter().map(|name| name.get_ref().as_str()).collect();
        if let Some(bad) = table
            .packages
            .iter()
            .find(|name| name.get_ref().contains([',', '+', ' ']) && !name.get_ref().contains("++"))
        {
            return Err(self.fault(bad.span(), format!("`{}` is not the name of one package", bad.get_ref())));
        }
        let separator = if from.contains('+') { "," } else { "+" };
        self.root_spec(&format!("{from}{separator}{}", names.join(",")), table.from.span())
    }

    fn limits(&self, table: &LimitsTable) -> Result<Limits, Fault> {
        let bytes = |text: &Option<Text>, bounds: RangeInclusive<u64>| {
            let Some(text) = text else { return Ok(None) };
            let bytes =
                parse_bytes(text.get_ref()).map_err(|error| self.fault(text.span(), error.to_string()))?;
            let (what, bound, which) = match bytes {
                bytes if bytes < *bounds.start() => ("too little", *bounds.start(), "least"),
                bytes if bytes > *bounds.end() => ("too much", *bounds.end(), "most"),
                bytes => return Ok(Some(bytes)),
            };
            let message = format!("{} is {what}: {} is the {which}", text.get_ref(), show_bytes(bound));
            Err(self.fault(text.span(), message))
        };
        let timeout = table.timeout.as_ref().map(|text| {
            let time = parse_duration(text.get_ref()).map_err(|error| error.to_string());
            let some = |time: std::time::Duration| match time.is_zero() {
                true => Err("no time at all: leave it out for no limit".to_owned()),
                false => Ok(time),
            };
            time.and_then(some).map_err(|message| self.fault(text.span(), message))
        });
        if let Some(cpus) = table.cpus.as_ref().filter(|cpus| !(1..=64).contains(cpus.get_ref())) {
            return Err(self.fault(cpus.span(), "cpus takes 1 to 64".to_owned()));
        }
        Ok(Limits {
            memory_bytes: bytes(&table.memory, MEMORY_BYTES)?,
            cpus: table.cpus.as_ref().map(|cpus| *cpus.get_ref()),
            scratch_bytes: bytes(&table.scratch, SCRATCH_BYTES)?,
            timeout: timeout.transpose()?,
            printed_bytes: bytes(&table.printed, 0..=u64::MAX)?,
            outputs_bytes: bytes(&table.outputs, 0..=u64::MAX)?,
            files: table.files,
            processes: table.processes.filter(|count| *count > 0),
        })
    }

    fn kernel(&self, table: &StepTable, names: &[&str]) -> Result<Option<Kernel>, Fault> {
        let modules = table.modules.as_ref();
        let of_no_file = |modules: &Text| {
            let fault = self.fault(modules.span(), "modules belong to a kernel that is a file".to_owned());
            fault.hint("kernel = \"file:PATH\"")
        };
        let Some(text) = &table.kernel else {
            return modules.map_or(Ok(None), |modules| Err(of_no_file(modules)));
        };
        match (text.get_ref().split_once(':'), modules) {
            (Some(("step", _)), None) => Ok(Some(Kernel::Step(self.output(text, names)?))),
            (Some(("debian", suite)), None) if !suite.is_empty() && !suite.contains('/') => {
                Ok(Some(Kernel::Debian(suite.to_owned())))
            }
            (Some(("debian", _)), Some(modules)) => Err(of_no_file(modules)),
            (Some(("file", path)), modules) if !path.is_empty() => Ok(Some(Kernel::File {
                kernel: path.into(),
                modules: modules.map(|modules| modules.get_ref().into()),
            })),
            _ => {
                let message = format!(
                    "`{}` names no kernel: write debian:SUITE, file:PATH or step:NAME",
                    text.get_ref()
                );
                Err(self.fault(text.span(), message))
            }
        }
    }

    /// What `step` does, and what runs that unless it says.
    fn command(&self, step: &Expanded<'_>) -> Result<(Command, &'static [&'static str]), Fault> {
        let table = &step.table;
        let make = (!table.make.0.is_empty()).then(|| ("make", step.span.clone()));
        let sign = table.sign.then(|| ("sign", step.span.clone()));
        let run = table.run.as_ref().map(|run| ("run", run.span()));
        let script = table.script.as_ref().map(|script| ("script", script.span()));
        let boot = table.boot.as_ref().map(|boot| ("boot", boot.image.span()));
        let mut said = [run, script, make, sign, boot].into_iter().flatten();
        if let (Some((one, _)), Some((other, span))) = (said.next(), said.next()) {
            let message = format!("step `{}` has both {one} and {other}", step.name);
            return Err(self.fault(span, message).hint("leave one of them out"));
        }
        if let Some(run) = &table.run {
            return Ok((Command::Text(run.get_ref().clone()), &["sh", "-eu", "-c"]));
        }
        if let Some(script) = &table.script {
            let path = script.get_ref();
            if path.is_empty() || path.starts_with('/') || path.split('/').any(|part| part == "..") {
                let message = format!("script `{path}` is no path in SRCDIR");
                return Err(self.fault(script.span(), message));
            }
            return Ok((Command::Script(path.clone()), &["sh", "-eu"]));
        }
        if table.sign || table.boot.is_some() || !table.make.0.is_empty() {
            let of_machines = [
                ("root", table.root.as_ref().map(Text::span)),
                ("kernel", table.kernel.as_ref().map(Text::span)),
                ("outputs", table.outputs.first().map(Text::span)),
                ("network", (table.network == NetworkWord::Full).then(|| step.span.clone())),
            ];
            if let Some((key, Some(span))) = of_machines.into_iter().find(|(_, span)| span.is_some()) {
                let message = format!("`{key}` belongs to a step that runs in a machine");
                let hint = match key {
                    "outputs" if table.boot.is_some() => {
                        "what it puts out is its report: report = \"FOLDER\""
                    }
                    "outputs" => "what it makes is what it puts out: leave it out",
                    _ => "leave it out",
                };
                return Err(self.fault(span, message).hint(hint));
            }
            if table.sign {
                return Ok((Command::Sign, &[]));
            }
            if let Some(boot) = &table.boot {
                return Ok((Command::Boot(Box::new(self.boot(step, boot)?)), &[]));
            }
            return Ok((Command::Make(self.makes(step)?), &[]));
        }
        let message = format!("step `{}` does nothing", step.name);
        Err(self.fault(step.span.clone(), message).hint("say what with run, script, make or boot"))
    }

    /// What a step that is not trusted runs on must not have this host's network.
    fn network(&self, step: &Expanded<'_>) -> Result<NetworkWord, Fault> {
        match (step.table.network, step.table.untrusted) {
            (NetworkWord::Full, true) => {
                let message = "`untrusted` and `network = \"full\"` contradict each other: QEMU would keep this host's network";
                Err(self.fault(step.span.clone(), message.to_owned()))
            }
            (network, _) => Ok(network),
        }
    }

    /// The step; `names` are those of all steps, in their order.
    pub fn step(
        &self,
        step: &Expanded<'_>,
        needs: Vec<StepId>,
        names: &[&str],
    ) -> Result<PlannedStep, Fault> {
        let table = &step.table;
        let (command, interpreter) = self.command(step)?;
        let outputs = match &command {
            Command::Make(makes) => self.made(makes, step.span.clone())?,
            Command::Boot(boot) => {
                let globs = boot.report.iter().map(|folder| folder.text());
                Outputs::parse(globs).map_err(|error| self.fault(step.span.clone(), error.to_string()))?
            }
            _ => self.globs(&table.outputs)?,
        };
        let interpreter = match table.interpreter.is_empty() {
            true => interpreter.iter().map(|word| (*word).to_owned()).collect(),
            false => table.interpreter.clone(),
        };
        let is_variable = |name: &String| !name.is_empty() && !name.contains(['=', '\0']);
        if let Some(bad) = table.env.keys().chain(&table.pass_env).find(|name| !is_variable(name)) {
            let message = format!("`{}` is no name of a variable", bad.escape_debug());
            return Err(self.fault(step.span.clone(), message));
        }
        let mut variables = table.env.keys().chain(&table.pass_env);
        if let Some(own) = variables.find(|name| OWN_VARIABLES.contains(&name.as_str())) {
            let message =
                format!("`{own}` says where step `{}` finds what it works on: kiln sets it", step.name);
            return Err(self
                .fault(step.span.clone(), message)
                .hint("take another name for a variable of your own"));
        }
        let named = table.env.iter().map(|(name, value)| format!("{name}={value}"));
        Ok(PlannedStep {
            name: step.name.clone(),
            root: match command.is_run() {
                true => self.root(step, names)?,
                false => Root::Spec(self.root_spec(DEFAULT_ROOT, step.span.clone())?),
            },
            kernel: self.kernel(table, names)?,
            command,
            interpreter,
            needs,
            inputs: self.globs(&table.inputs)?,
            outputs,
            sources: self.sources(table)?,
            env: named.chain(table.pass_env.iter().cloned()).collect(),
            directory: table.directory.clone(),
            writable_source: table.writable_source,
            network: self.network(step)?,
            clock: table.clock,
            limits: self.limits(&table.limits)?,
            untrusted: table.untrusted,
        })
    }
}
