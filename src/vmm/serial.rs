//! The two devices that are ports: the serial port that carries what the kernel prints, and the registers by which it
//! switches the machine off or resets it.

use std::io::{self, Write};

use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::{Effect, Window};

/// The first port of the serial port (COM1).
pub const PORT: u16 = 0x3f8;
/// How many it has.
pub const PORTS: u8 = 8;
/// Its interrupt.
pub const INTERRUPT: u32 = 4;

/// The sleep control and status registers (ACPI 6.5 §4.8.3.7), one port each, and the reset register.
pub const POWER_PORT: u16 = 0x600;
/// How many ports these are.
pub const POWER_PORTS: u8 = 3;
/// What is written to the reset register.
pub const RESET_VALUE: u8 = 1;
/// The sleep type of switched off, as `\_S5` says it.
pub const OFF: u8 = 5;

const SLEEP_CONTROL: u64 = 0;
const RESET: u64 = 2;
const SLEEP_ENABLE: u8 = 1 << 5;

/// Raises the serial port's interrupt.
#[derive(Debug)]
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// A 16550A whose output goes to `W`. Nothing is ever typed at it.
pub struct Console<W: Write + Send>(Serial<Line, NoEvents, W>);

/// The port's registers, in a frozen machine: divisor (low, high), interrupt enable and identification, line control and
/// status, modem control and status, scratch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ConsoleState([u8; 9]);

impl ConsoleState {
    /// Whether an interrupt of it waits to be taken (its identification register's lowest bit says that none does).
    pub(crate) fn owes_interrupt(&self) -> bool {
        self.0[3] & 1 == 0
    }
}

impl<W: Write + Send> Console<W> {
    /// A port that prints to `output`, and whose interrupt is `line`.
    pub fn new(line: EventFd, output: W) -> Self {
        Self(Serial::new(Line(line), output))
    }

    /// As [`Console::new`], but with the registers of a frozen one.
    ///
    /// # Errors
    /// The interrupt that it owes cannot be raised.
    pub fn thaw(state: ConsoleState, line: EventFd, output: W) -> io::Result<Self> {
        let [low, high, enable, identification, control, status, modem_control, modem_status, scratch] =
            state.0;
        let state = SerialState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: enable,
            interrupt_identification: identification,
            line_control: control,
            line_status: status,
            modem_control,
            modem_status,
            scratch,
            in_buffer: Vec::new(),
        };
        let port = Serial::from_state(&state, Line(line), NoEvents, output);
        port.map(Self).map_err(|error| io::Error::other(format!("{error:?}")))
    }
}

/// A port that can be part of a frozen machine.
pub trait Port: Window {
    /// Its registers.
    fn freeze(&self) -> ConsoleState;
}

impl<W: Write + Send> Port for Console<W> {
    fn freeze(&self) -> ConsoleState {
        let state = self.0.state();
        ConsoleState([
            state.baud_divisor_low,
            state.baud_divisor_high,
            state.interrupt_enable,
            state.interrupt_identification,
            state.line_control,
            state.line_status,
            state.modem_control,
            state.modem_status,
            state.scratch,
        ])
    }
}

impl<W: Write + Send> Window for Console<W> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        // The registers are bytes, and are read as such.
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self.0.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            // Nobody listens any more, or not fast enough: what is printed is lost, and the guest runs on.
            let _ = self.0.write(offset, *byte);
        }
        Effect::Nothing
    }
}

/// The registers of power-off and reset.
#[derive(Debug)]
pub struct Power;

impl Window for Power {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        match (offset, data) {
            (SLEEP_CONTROL, [value]) if *value == SLEEP_ENABLE | OFF << 2 => Effect::PowerOff,
            (RESET, [RESET_VALUE]) => Effect::Reset,
            _ => Effect::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_word_for_off_switches_off() {
        let mut power = Power;
        let ends: Vec<u8> =
            (0..=u8::MAX).filter(|byte| power.write(0, &[*byte]) != Effect::Nothing).collect();
        assert_eq!(ends, [0x34]);
        assert_eq!(power.write(0, &[0x34]), Effect::PowerOff);
        assert_eq!(power.write(2, &[1]), Effect::Reset);
        assert_eq!(power.write(1, &[0x34]), Effect::Nothing);
        assert_eq!(power.write(0, &[0x34, 0]), Effect::Nothing);
    }

    #[test]
    fn what_is_printed_comes_out_and_wider_accesses_do_nothing() {
        let mut console = Console::new(EventFd::new(0).expect("an eventfd"), Vec::new());
        for byte in b"hello" {
            assert_eq!(console.write(0, &[*byte]), Effect::Nothing);
        }
        console.write(0, b"xxxx");
        let mut wide = [0; 4];
        console.read(5, &mut wide);
        assert_eq!(wide, [0xff; 4]);
        assert_eq!(console.0.writer(), b"hello");
        let mut status = [0];
        console.read(5, &mut status);
        assert_eq!(status[0] & 0x20, 0x20, "the transmitter is ready");
    }
}
