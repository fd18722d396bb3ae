//! What kiln says and does where no machine has to start: bad input, settings, a host that lacks something, and agents
//! that lie. Each test has a store, a home and a WORK of its own, and nothing of it is on a network.

#![allow(clippy::disallowed_methods, reason = "a test fails by panicking")]
#![allow(clippy::panic, reason = "a test fails by panicking")]

#[path = "../acceptance/held.rs"]
mod acceptance;
mod ask;
mod boot;
mod boundary;
mod build;
mod debian;
mod doctor;
mod enter;
#[path = "../folder/mod.rs"]
mod folder;
mod host;
mod hub;
mod inputs;
mod jail;
#[path = "../judge/mod.rs"]
mod judge;
mod keeper;
mod lock;
mod manual;
mod merge;
mod qemu;
mod recipe;
mod roots;
mod scripts;
mod settings;
mod sign;
mod threads;
mod usage;
mod wire;
