//! From the tables of a recipe to steps: names resolved, quantities and globs read, an order found.

use std::collections::BTreeMap;
use std::ops::Range;

use globset::{GlobBuilder, GlobSetBuilder};

use super::{Command, DEFAULT_ROOT, Ignore, Kernel, Limits, PlannedStep, StepId};
use crate::plan::recipe::{Expanded, Fault, LimitsTable, Recipe, RootTable, StepTable, Text, nearest};
use crate::plan::{Outputs, RootSpec, parse_bytes, parse_duration, show_bytes};

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
        match nearest(word.get_ref(), known) {
            Some(meant) => fault.hint(format!("did you mean `{meant}`?")),
            None => fault,
        }
    }

    /// Puts `steps` into an order in which each comes after all it needs, and says which those are.
    pub fn order(&self, steps: &mut Vec<Expanded>) -> Result<Vec<Vec<StepId>>, Fault> {
        let mut families: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for (index, step) in steps.iter().enumerate() {
            families.entry(&step.family).or_default().push(index);
            if step.family != step.name {
                families.entry(&step.name).or_default().push(index);
            }
        }
        let mut needs: Vec<Vec<(usize, Range<usize>)>> = Vec::new();
        for step in steps.iter() {
            let mut found = Vec::new();
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
        let mut taken: Vec<Option<Expanded>> = steps.drain(..).map(Some).collect();
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
            let glob = GlobBuilder::new(&anywhere).literal_separator(true).build();
            set.add(glob.map_err(|error| bad(error.kind().to_string()))?);
            globs.push(text.get_ref().clone());
        }
        let set = set.build().map_err(|error| self.fault(0..0, error.to_string()))?;
        Ok(Ignore { globs, set })
    }

    fn globs(&self, texts: &[Text]) -> Result<Outputs, Fault> {
        for text in texts {
            Outputs::parse([text.get_ref().as_str()])
                .map_err(|error| self.fault(text.span(), error.to_string()))?;
        }
        Outputs::parse(texts.iter().map(|text| text.get_ref().as_str()))
            .map_err(|error| self.fault(0..0, error.to_string()))
    }

    fn root_spec(&self, text: &str, span: Range<usize>) -> Result<RootSpec, Fault> {
        let spec = text.parse::<RootSpec>().map_err(|error| self.fault(span.clone(), error.to_string()))?;
        match spec {
            RootSpec::Live(_) => Err(self
                .fault(span, "a live root has no digest that a step could be known by".to_owned())
                .hint("import it: dir:PATH")),
            spec => Ok(spec),
        }
    }

    fn root(&self, step: &Expanded) -> Result<RootSpec, Fault> {
        let roots = &self.recipe.roots;
        let table = match &step.table.root {
            Some(text) if text.get_ref().contains(':') => {
                return self.root_spec(text.get_ref(), text.span());
            }
            Some(text) => match roots.get(text.get_ref().as_str()) {
                Some(found) => found,
                None => {
                    let known = roots.keys().map(|name| name.get_ref().as_str());
                    return Err(self.unknown(text, "root", known));
                }
            },
            None if roots.is_empty() => return self.root_spec(DEFAULT_ROOT, step.span.clone()),
            None if roots.len() > 1 => {
                let names: Vec<&str> = roots.keys().map(|name| name.get_ref().as_str()).collect();
                let message = format!("step `{}` does not say which root it has", step.name);
                return Err(self
                    .fault(step.span.clone(), message)
                    .hint(format!("root = one of {}", names.join(", "))));
            }
            None => match roots.values().next() {
                Some(found) => found,
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
        if !from.starts_with("debian:") {
            let message = format!("`{from}` takes no packages: only debian: does");
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
        let bytes = |text: &Option<Text>, least: u64| {
            let Some(text) = text else { return Ok(None) };
            let bytes =
                parse_bytes(text.get_ref()).map_err(|error| self.fault(text.span(), error.to_string()))?;
            if bytes < least {
                let message = format!("{} is too little: {} is the least", text.get_ref(), show_bytes(least));
                return Err(self.fault(text.span(), message));
            }
            Ok(Some(bytes))
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
            memory_bytes: bytes(&table.memory, 128 << 20)?,
            cpus: table.cpus.as_ref().map(|cpus| *cpus.get_ref()),
            scratch_bytes: bytes(&table.scratch, 1 << 20)?,
            timeout: timeout.transpose()?,
            printed_bytes: bytes(&table.printed, 0)?,
            outputs_bytes: bytes(&table.outputs, 0)?,
            files: table.files,
            processes: table.processes.filter(|count| *count > 0),
        })
    }

    fn kernel(&self, table: &StepTable) -> Result<Option<Kernel>, Fault> {
        let modules = table.modules.as_ref();
        let of_no_file = |modules: &Text| {
            let fault = self.fault(modules.span(), "modules belong to a kernel that is a file".to_owned());
            fault.hint("kernel = \"file:PATH\"")
        };
        let Some(text) = &table.kernel else {
            return modules.map_or(Ok(None), |modules| Err(of_no_file(modules)));
        };
        match (text.get_ref().split_once(':'), modules) {
            (Some(("debian", suite)), None) if !suite.is_empty() && !suite.contains('/') => {
                Ok(Some(Kernel::Debian(suite.to_owned())))
            }
            (Some(("debian", _)), Some(modules)) => Err(of_no_file(modules)),
            (Some(("file", path)), modules) if !path.is_empty() => Ok(Some(Kernel::File {
                kernel: path.into(),
                modules: modules.map(|modules| modules.get_ref().into()),
            })),
            _ => {
                let message =
                    format!("`{}` names no kernel: write debian:SUITE or file:PATH", text.get_ref());
                Err(self.fault(text.span(), message))
            }
        }
    }

    pub fn step(&self, step: &Expanded, needs: Vec<StepId>) -> Result<PlannedStep, Fault> {
        let table = &step.table;
        let (command, interpreter) = match (&table.run, &table.script) {
            (Some(run), None) => (Command::Text(run.get_ref().clone()), vec!["sh", "-eu", "-c"]),
            (None, Some(script)) => {
                let path = script.get_ref();
                if path.is_empty() || path.starts_with('/') || path.split('/').any(|part| part == "..") {
                    let message = format!("script `{path}` is no path in SRCDIR");
                    return Err(self.fault(script.span(), message));
                }
                (Command::Script(path.clone()), vec!["sh", "-eu"])
            }
            (Some(_), Some(script)) => {
                let message = format!("step `{}` has both run and script", step.name);
                return Err(self.fault(script.span(), message).hint("leave one of them out"));
            }
            (None, None) => {
                let message = format!("step `{}` does nothing", step.name);
                return Err(self.fault(step.span.clone(), message).hint("say what with run or script"));
            }
        };
        let interpreter = match table.interpreter.is_empty() {
            true => interpreter.into_iter().map(str::to_owned).collect(),
            false => table.interpreter.clone(),
        };
        let is_variable = |name: &String| !name.is_empty() && !name.contains(['=', '\0']);
        if let Some(bad) = table.env.keys().chain(&table.pass_env).find(|name| !is_variable(name)) {
            let message = format!("`{}` is no name of a variable", bad.escape_debug());
            return Err(self.fault(step.span.clone(), message));
        }
        let named = table.env.iter().map(|(name, value)| format!("{name}={value}"));
        Ok(PlannedStep {
            name: step.name.clone(),
            root: self.root(step)?,
            kernel: self.kernel(table)?,
            command,
            interpreter,
            needs,
            inputs: self.globs(&table.inputs)?,
            outputs: self.globs(&table.outputs)?,
            sources: self.sources(table)?,
            env: named.chain(table.pass_env.iter().cloned()).collect(),
            directory: table.directory.clone(),
            writable_source: table.writable_source,
            clock: table.clock,
            limits: self.limits(&table.limits)?,
            untrusted: table.untrusted,
        })
    }
}
