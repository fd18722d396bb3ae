//! The judge of timelines: a reader that goes by the trace event format alone.

#![allow(clippy::panic, reason = "a judge fails by panicking")]
#![allow(dead_code, reason = "each test program looks at some of it")]

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

/// A span of a timeline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    pub process: String,
    pub lane: u64,
    pub name: String,
    pub start: u64,
    pub end: u64,
    /// How many spans it lies in.
    pub depth: usize,
    pub arguments: Value,
}

/// Reads a timeline. Asserts that it is in the trace event format's form of an object, that time goes on from event to event,
/// that spans of a lane lie in each other or apart, and that every lane and process has a name.
pub fn timeline(text: &str) -> Vec<Span> {
    let file: Value = serde_json::from_str(text).expect("a timeline is JSON");
    let number = |event: &Value, key: &str| {
        event[key].as_u64().unwrap_or_else(|| panic!("{key} is no whole number in {event}"))
    };
    let word = |value: &Value| value.as_str().unwrap_or_else(|| panic!("no text: {value}")).to_owned();
    let mut processes = BTreeMap::new();
    let mut lanes = BTreeSet::new();
    let mut spans: Vec<Span> = Vec::new();
    let mut open: BTreeMap<(u64, u64), Vec<u64>> = BTreeMap::new();
    let mut last = 0;
    for event in file["traceEvents"].as_array().expect("a list of events") {
        let (process, lane) = (number(event, "pid"), number(event, "tid"));
        let name = word(&event["name"]);
        match event["ph"].as_str() {
            Some("M") => {
                let named = word(&event["args"]["name"]);
                match name.as_str() {
                    "process_name" => assert_eq!(processes.insert(process, named), None),
                    "thread_name" => assert!(lanes.insert((process, lane)), "named twice: {event}"),
                    _ => panic!("what is {event}?"),
                }
            }
            Some("X") => {
                let start = number(event, "ts");
                let end = start + number(event, "dur");
                assert!(start >= last, "time goes back at {event}");
                last = start;
                let inside = open.entry((process, lane)).or_default();
                while inside.last().is_some_and(|outer| *outer <= start) {
                    inside.pop();
                }
                assert!(
                    inside.last().is_none_or(|outer| end <= *outer),
                    "{event} ends after what it lies in"
                );
                let depth = inside.len();
                inside.push(end);
                assert!(lanes.contains(&(process, lane)), "a lane without a name: {event}");
                let process = processes.get(&process).expect("a process has a name").clone();
                let arguments = event["args"].clone();
                spans.push(Span { process, lane, name, start, end, depth, arguments });
            }
            _ => panic!("what is {event}?"),
        }
    }
    spans
}
