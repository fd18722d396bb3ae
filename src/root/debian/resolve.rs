//! From a suite's packages to those that a root needs: the essential ones, those named, and all they depend on.
//!
//! A greedy walk, as apt's: one version of a package, the highest unless a relation says otherwise; relations
//! that leave no choice first, then the choices in the order they came up, each decided by what is
//! chosen already, else its first alternative, else a provider by priority and name. Nothing is undone. The result
//! is a function of the indexes alone. Recommended packages are not taken.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap, VecDeque};

use super::packages::{Package, Priority};
use super::relation::{self, Group, Operator, Relation, RelationError};
use super::spec::DebianSpec;
use super::version;

/// Taken wherever it is one of the alternatives: kiln lays a root out with a merged `/usr` from the start, so
/// what would convert one, and its dependencies, are not needed.
const PREFERRED: [&str; 1] = ["usr-is-merged"];
/// How many names an error suggests.
const SUGGESTIONS: usize = 4;

/// Why no set of packages fulfils a spec.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// A package that no index has.
    #[error("there is no package `{package}` in {suite}")]
    Unknown {
        /// What was named.
        package: String,
        /// The suite.
        suite: String,
        /// Names that look like it.
        nearest: Vec<String>,
        /// Packages that provide it, where it is a virtual package.
        providers: Vec<String>,
    },
    /// A version that no index has.
    #[error("there is no version {version} of package `{package}` in {suite}")]
    NoVersion {
        /// The package.
        package: String,
        /// The version that was named.
        version: String,
        /// The suite.
        suite: String,
        /// The versions there are.
        available: Vec<String>,
    },
    /// A relation that cannot be fulfilled.
    #[error("{}: {reason}", .chain.join(" → "))]
    Unsatisfiable {
        /// From what was asked for to what cannot be had.
        chain: Vec<String>,
        /// Why it cannot.
        reason: String,
    },
    /// A relation that cannot be read.
    #[error("package `{package}`")]
    Relation {
        /// Whose relation.
        package: String,
        /// What is wrong with it.
        #[source]
        source: RelationError,
    },
    /// A suite that no root can be made of.
    #[error("{suite} has no essential packages")]
    NoEssential {
        /// The suite.
        suite: String,
    },
}

impl ResolveError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Unknown { providers, .. } if !providers.is_empty() => {
                Some(format!("it is a virtual package; name one that provides it: {}", providers.join(", ")))
            }
            Self::Unknown { nearest, .. } if !nearest.is_empty() => {
                Some(format!("did you mean {}?", nearest.join(", ")))
            }
            Self::Unknown { .. } => Some("check the name, the suite and the components of the mirror".into()),
            Self::NoVersion { available, .. } => Some(format!("there is {}", available.join(", "))),
            Self::Unsatisfiable { .. } => {
                Some("name another package or version, or a suite that has what is missing".into())
            }
            Self::Relation { .. } => None,
            Self::NoEssential { .. } => Some("name a suite such as bookworm or trixie".into()),
        }
    }
}

/// The packages of all pockets of a suite, for lookup.
pub struct Universe<'a> {
    suite: &'a str,
    packages: Vec<&'a Package<'a>>,
    /// By name: versions, highest first; of equal ones that of the earlier pocket.
    by_name: HashMap<&'a str, Vec<usize>>,
    /// By provided name: who provides it, in which version.
    providers: HashMap<&'a str, Vec<(usize, Option<&'a str>)>>,
}

impl<'a> Universe<'a> {
    /// A universe of the `pockets` of `suite`.
    pub fn new(suite: &'a str, pockets: impl IntoIterator<Item = &'a [Package<'a>]>) -> Self {
        let packages: Vec<_> = pockets.into_iter().flatten().collect();
        let mut by_name: HashMap<_, Vec<_>> = HashMap::with_capacity(packages.len());
        let mut providers: HashMap<_, Vec<_>> = HashMap::new();
        for (index, package) in packages.iter().enumerate() {
            by_name.entry(package.name).or_default().push(index);
            // What does not read provides nothing; nobody may ever ask for it.
            for provided in relation::parse(package.provides).unwrap_or_default().iter().flatten() {
                let version = provided.constraint.map(|(_, version)| version);
                providers.entry(provided.name).or_default().push((index, version));
            }
        }
        let mut universe = Self { suite, packages, by_name, providers };
        let packages = &universe.packages;
        for versions in universe.by_name.values_mut() {
            versions
                .sort_by(|&a, &b| version::compare(packages[b].version, packages[a].version).then(a.cmp(&b)));
        }
        for list in universe.providers.values_mut() {
            list.sort_by(|&(a, _), &(b, _)| {
                let (x, y) = (packages[a], packages[b]);
                let order = (x.priority, x.name).cmp(&(y.priority, y.name));
                order.then_with(|| version::compare(y.version, x.version)).then(a.cmp(&b))
            });
        }
        universe
    }

    /// All versions of `name`, highest first.
    pub fn versions(&self, name: &str) -> impl Iterator<Item = &'a Package<'a>> {
        self.by_name.get(name).into_iter().flatten().map(|&index| self.packages[index])
    }

    fn unknown(&self, package: &str) -> ResolveError {
        let providers: BTreeSet<_> = self
            .providers
            .get(package)
            .into_iter()
            .flatten()
            .map(|&(index, _)| self.packages[index].name)
            .collect();
        ResolveError::Unknown {
            package: package.to_owned(),
            suite: self.suite.to_owned(),
            nearest: if providers.is_empty() { self.nearest(package) } else { Vec::new() },
            providers: providers.into_iter().map(ToOwned::to_owned).collect(),
        }
    }

    fn nearest(&self, wanted: &str) -> Vec<String> {
        let limit = wanted.len() / 3 + 1;
        let names: BTreeSet<&str> = self.packages.iter().map(|package| package.name).collect();
        let mut near: Vec<_> = names
            .into_iter()
            .filter(|name| name.len().abs_diff(wanted.len()) <= limit)
            .map(|name| (distance(wanted, name), wanted.get(..1) != name.get(..1), name))
            .filter(|(distance, ..)| *distance <= limit)
            .collect();
        near.sort_unstable();
        near.into_iter().take(SUGGESTIONS).map(|(.., name)| name.to_owned()).collect()
    }

    /// The package that `name` and `wanted` (a version) stand for when a person names them.
    fn named(&self, name: &str, wanted: Option<&str>) -> Result<usize, ResolveError> {
        let versions = self.by_name.get(name).ok_or_else(|| self.unknown(name))?;
        versions
            .iter()
            .copied()
            .find(|&index| {
                wanted.is_none_or(|wanted| version::compare(self.packages[index].version, wanted).is_eq())
            })
            .ok_or_else(|| ResolveError::NoVersion {
                package: name.to_owned(),
                version: wanted.unwrap_or_default().to_owned(),
                suite: self.suite.to_owned(),
                available: versions.iter().map(|&index| self.packages[index].version.to_owned()).collect(),
            })
    }

    fn essential(&self) -> Vec<usize> {
        let names: BTreeSet<&str> =
            self.packages.iter().filter(|package| package.essential).map(|package| package.name).collect();
        let highest = names.into_iter().filter_map(|name| self.by_name.get(name)?.first().copied());
        highest.filter(|&index| self.packages[index].essential).collect()
    }

    /// The packages that would fulfil `relation`, best first: real ones, then those that provide it.
    fn candidates(&self, relation: &Relation<'_>) -> Vec<usize> {
        // Everything here is of one architecture, which `any` and `native` include.
        if relation
            .qualifier
            .is_some_and(|qualifier| !matches!(qualifier, "any" | "native" | "amd64" | "all"))
        {
            return Vec::new();
        }
        let real = self.by_name.get(relation.name).into_iter().flatten().copied();
        let real = real.filter(|&index| relation.admits(self.packages[index].version));
        let providers = self.providers.get(relation.name).into_iter().flatten();
        let providers =
            providers.filter(|(_, version)| provides(relation, *version)).map(|&(index, _)| index);
        real.chain(providers).collect()
    }
}

/// Whether a package that provides the name in `version` fulfils `relation` (Policy §7.5).
fn provides(relation: &Relation<'_>, version: Option<&str>) -> bool {
    match version {
        Some(version) => relation.admits(version),
        None => relation.constraint.is_none(),
    }
}

/// How many characters to change to make one name of the other (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let above = row[j + 1];
            row[j + 1] = (diagonal + usize::from(x != y)).min(above + 1).min(row[j] + 1);
            diagonal = above;
        }
    }
    row[b.len()]
}

/// Why a package was taken.
struct Reason<'a> {
    by: usize,
    relation: Relation<'a>,
}

/// The packages taken so far.
struct Walk<'u, 'a> {
    universe: &'u Universe<'a>,
    /// In the order they were taken.
    taken: Vec<usize>,
    by_name: HashMap<&'a str, usize>,
    provided: HashMap<&'a str, Vec<(usize, Option<&'a str>)>>,
    /// What those taken cannot be together with: by name, who says so and in which versions.
    against: HashMap<&'a str, Vec<(usize, Relation<'a>)>>,
    reasons: HashMap<usize, Reason<'a>>,
    /// Relations still to be fulfilled that leave no choice, and those that do.
    certain: VecDeque<(usize, Group<'a>)>,
    choices: VecDeque<(usize, Group<'a>)>,
}

/// The packages of a root for `spec`, by name.
///
/// # Errors
/// [`ResolveError`], as its variants say.
pub fn resolve<'a>(universe: &Universe<'a>, spec: &DebianSpec) -> Result<Vec<&'a Package<'a>>, ResolveError> {
    let mut walk = Walk::of_named(universe, spec)?;
    let essential = universe.essential();
    if essential.is_empty() {
        return Err(ResolveError::NoEssential { suite: spec.suite().to_owned() });
    }
    for index in essential {
        if !walk.by_name.contains_key(universe.packages[index].name) {
            walk.take(index, None)?;
        }
    }
    walk.run()?;
    Ok(walk.packages())
}

/// The packages that `spec` names and all they depend on, by name: not a root, but what runs beside one.
///
/// # Errors
/// [`ResolveError`], as its variants say.
pub fn closure<'a>(universe: &Universe<'a>, spec: &DebianSpec) -> Result<Vec<&'a Package<'a>>, ResolveError> {
    let mut walk = Walk::of_named(universe, spec)?;
    walk.run()?;
    Ok(walk.packages())
}

/// The packages that `spec` names, and those that they need in exactly one version: what a metapackage stands for.
///
/// # Errors
/// [`ResolveError`], as its variants say.
pub fn exact<'a>(universe: &Universe<'a>, spec: &DebianSpec) -> Result<Vec<&'a Package<'a>>, ResolveError> {
    let mut open: Vec<usize> =
        spec.packages().map(|(name, wanted)| universe.named(name, wanted)).collect::<Result<_, _>>()?;
    let mut taken: BTreeSet<usize> = BTreeSet::new();
    while let Some(index) = open.pop() {
        if !taken.insert(index) {
            continue;
        }
        let package = universe.packages[index];
        let groups = relation::parse(package.depends)
            .map_err(|source| ResolveError::Relation { package: package.name.to_owned(), source })?;
        for relation in groups.iter().filter_map(|group| group.first()) {
            if let Some((Operator::Equal, version)) = relation.constraint {
                open.push(universe.named(relation.name, Some(version))?);
            }
        }
    }
    let mut packages: Vec<_> = taken.into_iter().map(|index| universe.packages[index]).collect();
    packages.sort_by_key(|package| package.name);
    Ok(packages)
}

impl<'u, 'a> Walk<'u, 'a> {
    /// A walk that begins with what `spec` names.
    fn of_named(universe: &'u Universe<'a>, spec: &DebianSpec) -> Result<Self, ResolveError> {
        let mut walk = Self {
            universe,
            taken: Vec::new(),
            by_name: HashMap::new(),
            provided: HashMap::new(),
            against: HashMap::new(),
            reasons: HashMap::new(),
            certain: VecDeque::new(),
            choices: VecDeque::new(),
        };
        for (name, wanted) in spec.packages() {
            let index = universe.named(name, wanted)?;
            walk.take(index, None)?;
        }
        Ok(walk)
    }

    /// What was taken, by name.
    fn packages(&self) -> Vec<&'a Package<'a>> {
        let mut packages: Vec<_> = self.taken.iter().map(|&index| self.universe.packages[index]).collect();
        packages.sort_by_key(|package| package.name);
        packages
    }

    fn package(&self, index: usize) -> &'a Package<'a> {
        self.universe.packages[index]
    }

    fn relations(&self, index: usize, field: &'a str) -> Result<Vec<Group<'a>>, ResolveError> {
        relation::parse(field)
            .map_err(|source| ResolveError::Relation { package: self.package(index).name.to_owned(), source })
    }

    fn run(&mut self) -> Result<(), ResolveError> {
        loop {
            if let Some((by, group)) = self.certain.pop_front() {
                self.fulfil(by, &group)?;
            } else if let Some((by, group)) = self.choices.pop_front() {
                self.fulfil(by, &group)?;
            } else {
                return Ok(());
            }
        }
    }

    /// Takes the package `index`, which nothing of those taken contradicts by name.
    fn take(&mut self, index: usize, reason: Option<Reason<'a>>) -> Result<(), ResolveError> {
        let package = self.package(index);
        if let Some(reason) = reason {
            self.reasons.insert(index, reason);
        }
        if let Some(text) = self.conflict(index)? {
            return Err(ResolveError::Unsatisfiable { chain: self.chain(index), reason: text });
        }
        self.taken.push(index);
        self.by_name.insert(package.name, index);
        for provided in self.relations(index, package.provides)?.into_iter().flatten() {
            let version = provided.constraint.map(|(_, version)| version);
            self.provided.entry(provided.name).or_default().push((index, version));
        }
        for field in [package.conflicts, package.breaks] {
            for relation in self.relations(index, field)?.into_iter().flatten() {
                self.against.entry(relation.name).or_default().push((index, relation));
            }
        }
        for field in [package.pre_depends, package.depends] {
            for group in self.relations(index, field)? {
                let is_certain =
                    matches!(&group[..], [only] if self.universe.by_name.contains_key(only.name));
                let queue = if is_certain { &mut self.certain } else { &mut self.choices };
                queue.push_back((index, group));
            }
        }
        Ok(())
    }

    fn is_fulfilled(&self, relation: &Relation<'_>) -> bool {
        let real = self.by_name.get(relation.name);
        real.is_some_and(|&index| relation.admits(self.package(index).version))
            || self
                .provided
                .get(relation.name)
                .is_some_and(|list| list.iter().any(|(_, version)| provides(relation, *version)))
    }

    fn fulfil(&mut self, by: usize, group: &Group<'a>) -> Result<(), ResolveError> {
        if group.iter().any(|relation| self.is_fulfilled(relation)) {
            return Ok(());
        }
        let mut options: Vec<_> = group
            .iter()
            .flat_map(|relation| {
                self.universe.candidates(relation).into_iter().map(move |index| (index, *relation))
            })
            .collect();
        options.sort_by_key(|(index, _)| Reverse(PREFERRED.contains(&self.package(*index).name)));
        for &(index, relation) in &options {
            let is_free = !self.by_name.contains_key(self.package(index).name);
            if is_free && self.conflict(index)?.is_none() {
                return self.take(index, Some(Reason { by, relation }));
            }
        }
        Err(self.unsatisfiable(by, group, &options)?)
    }

    /// Why `index` cannot be together with what is taken, if it cannot.
    fn conflict(&self, index: usize) -> Result<Option<String>, ResolveError> {
        let package = self.package(index);
        let other = |name: &str| name != package.name;
        // What is taken against the newcomer …
        let own = std::iter::once((package.name, Some(package.version)));
        let provided = self.relations(index, package.provides)?;
        let provided =
            provided.iter().flatten().map(|relation| (relation.name, relation.constraint.map(|(_, v)| v)));
        for (position, (name, version)) in own.chain(provided).enumerate() {
            for (who, relation) in self.against.get(name).into_iter().flatten() {
                let holds = match version {
                    Some(version) => relation.admits(version),
                    None => relation.constraint.is_none(),
                };
                debug_assert!(position > 0 || version.is_some());
                if holds && other(self.package(*who).name) {
                    return Ok(Some(format!("{} conflicts with {relation}", self.chain(*who).join(" → "))));
                }
            }
        }
        // … and the newcomer against what is taken.
        for field in [package.conflicts, package.breaks] {
            for relation in self
                .relations(index, field)?
                .into_iter()
                .flatten()
                .filter(|r| other(r.name) || r.constraint.is_some())
            {
                let real = self.by_name.get(relation.name).copied();
                let real = real.filter(|&taken| relation.admits(self.package(taken).version));
                let providers = self.provided.get(relation.name).into_iter().flatten();
                let provider =
                    providers.filter(|(_, version)| provides(&relation, *version)).map(|&(taken, _)| taken);
                let mut others = real.into_iter().chain(provider);
                if let Some(taken) = others.find(|&taken| other(self.package(taken).name)) {
                    let whole = self.chain(taken).join(" → ");
                    return Ok(Some(format!("it conflicts with {relation}, needed by {whole}")));
                }
            }
        }
        Ok(None)
    }

    /// From what was asked for to `index`: names and relations.
    fn chain(&self, index: usize) -> Vec<String> {
        let mut chain = Vec::new();
        let mut at = index;
        while let Some(reason) = self.reasons.get(&at) {
            let name = self.package(at).name;
            let relation = reason.relation;
            let step =
                if relation.name == name { relation.to_string() } else { format!("{relation} (as {name})") };
            chain.push(step);
            at = reason.by;
        }
        chain.push(self.package(at).name.to_owned());
        chain.reverse();
        chain
    }

    fn unsatisfiable(
        &self,
        by: usize,
        group: &Group<'a>,
        options: &[(usize, Relation<'a>)],
    ) -> Result<ResolveError, ResolveError> {
        let mut chain = self.chain(by);
        chain.push(group.iter().map(ToString::to_string).collect::<Vec<_>>().join(" | "));
        let mut reasons = Vec::new();
        for relation in group {
            let mine: Vec<_> =
                options.iter().filter(|(_, of)| of == relation).map(|(index, _)| *index).collect();
            if let Some(&first) = mine.first() {
                let name = self.package(first).name;
                if let Some(&taken) = self.by_name.get(name) {
                    let version = self.package(taken).version;
                    reasons.push(format!(
                        "{name} {version} is taken already, by {}",
                        self.chain(taken).join(" → ")
                    ));
                } else if let Some(conflict) = self.conflict(first)? {
                    reasons.push(conflict);
                }
                continue;
            }
            let versions: Vec<_> =
                self.universe.versions(relation.name).map(|package| package.version).collect();
            reasons.push(if versions.is_empty() {
                format!("{} has no {}", self.universe.suite, relation.name)
            } else {
                format!("{} has {} {}", self.universe.suite, relation.name, versions.join(", "))
            });
        }
        Ok(ResolveError::Unsatisfiable { chain, reason: reasons.join("; ") })
    }
}

/// The order of importance is part of how providers are chosen.
const _: () = assert!((Priority::Required as u8) < Priority::Extra as u8);

#[cfg(test)]
mod tests {
    use super::super::packages;
    use super::*;

    fn index(paragraphs: &str) -> String {
        let base = "Package: base-files\nVersion: 12\nEssential: yes\nPriority: required\n";
        let all = format!("{base}\n{paragraphs}");
        all.trim()
            .split("\n\n")
            .map(|paragraph| {
                let name = paragraph.lines().next().and_then(|line| line.split(' ').nth(1)).expect("a name");
                let version = if paragraph.contains("Version:") { "" } else { "Version: 1\n" };
                let digest = Digest::of(paragraph.as_bytes());
                format!("{paragraph}\n{version}Architecture: amd64\nFilename: pool/{name}\nSize: 1\nSHA256: {digest}\n\n")
            })
            .collect()
    }

    use kiln_digest::Digest;

    fn solve(paragraphs: &str, spec: &str) -> Result<Vec<String>, ResolveError> {
        let text = index(paragraphs);
        let packages = packages::parse(text.as_bytes(), "amd64").expect("an index");
        let universe = Universe::new("test", [&packages[..]]);
        let chosen = resolve(&universe, &spec.parse().expect("a spec"))?;
        Ok(chosen.iter().map(|package| format!("{}={}", package.name, package.version)).collect())
    }

    #[test]
    fn dependencies_are_followed_to_the_end() {
        let index = "Package: aa\nDepends: bb (>= 1), cc:any\nRecommends: zz\n\nPackage: bb\nPre-Depends: dd\n\n\
                     Package: cc\n\nPackage: dd\nDepends: aa\n\nPackage: zz\n";
        let chosen = solve(index, "debian:test+aa").expect("a set");
        assert_eq!(chosen, ["aa=1", "base-files=12", "bb=1", "cc=1", "dd=1"]);
        assert_eq!(solve(index, "debian:test").expect("a set"), ["base-files=12"]);
    }

    #[test]
    fn the_highest_version_is_taken_unless_one_is_named() {
        let index = "Package: aa\nVersion: 2\n\nPackage: aa\nVersion: 10\n\nPackage: bb\nDepends: aa (<< 5)\n\n\
                     Package: cc\nDepends: aa (= 10)\n";
        assert_eq!(solve(index, "debian:test+aa").expect("a set")[0], "aa=10");
        assert_eq!(solve(index, "debian:test+aa=2").expect("a set")[0], "aa=2");
        assert_eq!(solve(index, "debian:test+bb").expect("a set")[0], "aa=2");
        let error = solve(index, "debian:test+aa=2,cc").expect_err("two versions");
        assert!(error.to_string().starts_with("cc → aa (= 10): aa 2 is taken already"), "{error}");
        let error = solve(index, "debian:test+aa=3").expect_err("no such version");
        assert_eq!(error.hint().expect("a hint"), "there is 10, 2");
    }

    #[test]
    fn choices_fall_on_what_is_there_then_the_first_then_a_provider() {
        let index = "Package: aa\nDepends: xx | yy\n\nPackage: bb\nDepends: awk\n\nPackage: gawk\nProvides: awk\n\
                     Priority: optional\n\nPackage: mawk\nProvides: awk\nPriority: required\n\nPackage: yy\n\n\
                     Package: xx\n\nPackage: cc\nDepends: missing | yy\n\nPackage: dd\nDepends: vv (>= 2)\n\n\
                     Package: pp\nProvides: vv\n\nPackage: qq\nProvides: vv (= 2.1)\n\n\
                     Package: ee\nDepends: usrmerge | usr-is-merged\n\nPackage: usrmerge\n\nPackage: usr-is-merged\n";
        let with = |spec: &str| solve(index, spec).expect("a set").join(" ");
        assert!(with("debian:test+aa").contains("xx=1"));
        assert!(!with("debian:test+aa,yy").contains("xx=1"));
        assert!(with("debian:test+bb").contains("mawk=1"));
        assert!(!with("debian:test+bb,gawk").contains("mawk=1"));
        assert!(with("debian:test+cc").contains("yy=1"));
        assert!(with("debian:test+dd").contains("qq=1"));
        assert!(!with("debian:test+ee").contains("usrmerge=1"));
    }

    #[test]
    fn what_cannot_be_had_is_told_with_the_whole_chain() {
        let index = "Package: aa\nDepends: bb\n\nPackage: bb\nDepends: cc (>= 2) | dd\n\nPackage: cc\n";
        let error = solve(index, "debian:test+aa").expect_err("no dd");
        assert_eq!(error.to_string(), "aa → bb → cc (>= 2) | dd: test has cc 1; test has no dd");
    }

    #[test]
    fn conflicts_and_breaks_are_found_in_either_order() {
        let index = "Package: aa\nConflicts: bb\n\nPackage: bb\n\nPackage: cc\nBreaks: dd (<< 2)\n\nPackage: dd\n\n\
                     Package: ee\nProvides: mta\nConflicts: mta\n\nPackage: ff\nProvides: mta\nConflicts: mta\n\n\
                     Package: gg\nDepends: bb | hh\n\nPackage: hh\n";
        for spec in ["debian:test+aa,bb", "debian:test+cc,dd", "debian:test+ee,ff"] {
            let error = solve(index, spec).expect_err(spec);
            assert!(error.to_string().contains("conflicts with"), "{error}");
        }
        assert_eq!(solve(index, "debian:test+ee").expect("its own name").len(), 2);
        assert!(solve(index, "debian:test+aa,gg").expect("the other").contains(&"hh=1".to_owned()));
    }

    #[test]
    fn unknown_names_get_suggestions() {
        let index = "Package: python3\n\nPackage: pythia\n\nPackage: mawk\nProvides: awk\n";
        let error = solve(index, "debian:test+pyton3").expect_err("a slip");
        assert!(error.hint().expect("a hint").starts_with("did you mean python3"));
        let error = solve(index, "debian:test+awk").expect_err("virtual");
        assert!(error.hint().expect("a hint").contains("mawk"));
    }
}
