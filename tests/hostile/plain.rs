//! Devices whose driver says all that it has to say by what it offers, as targets: entropy and balloon.

use kiln_virtio::balloon::Balloon;
use kiln_virtio::device::{Device, Wake};
use kiln_virtio::rng::Rng;

use super::rings::{Driver, POISON, Rings};
use super::script::{Step, Target};
use super::value::Value;

/// A device and its driver.
pub struct PlainTarget {
    device: Box<dyn Device<()>>,
    rings: Rings,
    kind: Kind,
}

/// What is different about them.
#[derive(Clone, Copy)]
struct Kind {
    /// How many queues there is memory for, and which of them statements are about at first.
    queues: usize,
    queue: usize,
    /// Room that a good driver offers, what comes back of it, and whether it holds all the same byte then.
    room: u32,
    used: u32,
    is_empty: bool,
}

const RNG: Kind = Kind { queues: 1, queue: 0, room: 64, used: 64, is_empty: false };
const BALLOON: Kind = Kind { queues: 3, queue: 2, room: 8192, used: 0, is_empty: true };

impl PlainTarget {
    /// An entropy device.
    pub fn rng(driver: Driver) -> Result<Self, String> {
        Self::new(Box::new(Rng::new()), RNG, driver)
    }

    /// A balloon, of which Linux has the queue of reports at this place.
    pub fn balloon(driver: Driver) -> Result<Self, String> {
        Self::new(Box::new(Balloon::new()), BALLOON, driver)
    }

    fn new(device: Box<dyn Device<()>>, kind: Kind, driver: Driver) -> Result<Self, String> {
        let mut target = Self { device, rings: Rings::new(kind.queues, driver)?, kind };
        target.renew()?;
        Ok(target)
    }

    fn renew(&mut self) -> Result<(), String> {
        self.rings.renew(self.kind.queues)?;
        self.rings.current = self.kind.queue;
        Ok(())
    }

    fn process(&mut self) -> Result<(), String> {
        let queue = self.rings.current;
        self.rings.process(&mut *self.device, Wake::Queue(queue))
    }
}

impl Target for PlainTarget {
    fn act(&mut self, step: &mut Step) -> Result<(), String> {
        if self.rings.act(step)? {
            return Ok(());
        }
        match step.verb.as_str() {
            "kick" => {
                for _ in 0..step.number("times", 1_u64)? {
                    self.process()?;
                }
                self.rings.expect_kick(step)
            }
            "reset" => {
                self.device.reset();
                self.renew()
            }
            "forget_driver" => {
                self.device.reset();
                Ok(())
            }
            verb => Err(format!("`{verb}` is not known here")),
        }
    }

    fn name(&self, name: &str) -> Option<Value> {
        self.rings.name(name)
    }

    fn call(&mut self, function: &str, arguments: &[Value]) -> Result<Value, String> {
        self.rings.call(function, arguments)
    }

    fn serve(&mut self) -> Result<(), String> {
        self.device.reset();
        self.renew()?;
        let (data, _) = self.rings.places()?;
        self.rings.describe(0, (data, self.kind.room), 2, 0)?;
        self.rings.offer(0)?;
        self.process()?;
        let used = self.rings.used()?;
        let bytes = self.rings.read(data, self.kind.room as usize)?;
        let as_expected = match self.kind.is_empty {
            true => bytes.iter().all(|byte| *byte == 0),
            false => bytes.iter().any(|byte| *byte != POISON),
        };
        match used == Some((0, self.kind.used)) && as_expected {
            true => Ok(()),
            false => Err(format!("a good request gets {used:?}")),
        }
    }
}
