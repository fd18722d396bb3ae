//! The ACPI tables of a machine (ACPI 6.5): RSDP, XSDT, FADT, MADT and a DSDT that names the serial port, the
//! virtio-mmio devices (`LNRO0005`) and the machine's generation id.
//!
//! The platform is hardware-reduced (§4.1): no power-management timer, no fixed events, no PIC or PIT that a kernel would
//! have to try out. Power-off and reset are registers (§4.8.3.7, §4.8.3.6), and Debian's cloud kernel, which takes
//! no virtio-mmio devices from its command line, finds them in the DSDT.

use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, Package, Path,
    ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::memory::{ACPI, GENERATION_ID, HIGH_MEMORY, WINDOW_BYTES, WINDOWS};
use crate::serial;

/// Where the processors' interrupt controllers are (Intel SDM vol. 3, 12.4.1).
const LOCAL_APIC: u32 = 0xfee0_0000;
/// Where the controller of the devices' interrupts is.
const IO_APIC: u32 = 0xfec0_0000;
/// How many interrupts that one takes.
const IO_APIC_PINS: u32 = 24;
/// The interrupt that tells of a new generation id.
pub const GENERATION_INTERRUPT: u32 = 5;
/// The interrupt of the first virtio-mmio device; the others follow.
const FIRST_INTERRUPT: u32 = 6;
/// How many virtio-mmio devices a machine can have, an interrupt each.
pub const MOST_DEVICES: usize = 18;

const OEM: [u8; 6] = *b"KILN  ";
const TABLE: [u8; 8] = *b"KILNVMM ";
const REVISION: u32 = 1;

/// Boot architecture flags (§5.2.9.3): no VGA, no CMOS clock; that there is no 8042 is said by its bit's absence.
const BOOT_ARCHITECTURE: u16 = 1 << 2 | 1 << 5;

/// The window and the interrupt of the virtio-mmio device `index`.
#[must_use]
pub fn place(index: usize) -> Option<(GuestAddress, u32)> {
    let index = u32::try_from(index).ok().filter(|_| index < MOST_DEVICES)?;
    Some((GuestAddress(WINDOWS.0 + u64::from(index) * WINDOW_BYTES), FIRST_INTERRUPT + index))
}

/// Why a machine has no tables.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// More devices than interrupts.
    #[error("a machine has at most {MOST_DEVICES} virtio devices, and this one {0}")]
    TooManyDevices(usize),
    /// The tables do not fit below 1 MiB.
    #[error("the ACPI tables do not fit: {0} bytes")]
    TooLarge(usize),
    /// Memory ends before them.
    #[error("the ACPI tables cannot be written")]
    Write(#[source] vm_memory::GuestMemoryError),
}

/// Collects a table's bytes.
struct Sink<'a>(&'a mut Vec<u8>);

impl AmlSink for Sink<'_> {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

fn bytes_of(part: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    part.to_aml_bytes(&mut Sink(&mut bytes));
    bytes
}

/// A register of one port.
fn port(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port))
}

/// The differentiated description of the hardware: what the kernel cannot find by itself.
fn dsdt(devices: usize) -> Result<Vec<u8>, AcpiError> {
    let mut body = Vec::new();
    let serial = bytes_of(&Device::new(
        Path::new("COM1"),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &0_u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Interrupt::new(true, true, false, false, serial::INTERRUPT),
                    &IO::new(serial::PORT, serial::PORT, 1, serial::PORTS),
                ]),
            ),
        ],
    ));
    body.extend(Scope::raw(Path::new("\\_SB_"), serial));

    // Virtual Machine Generation ID: where the id is, and a device that says when it is another.
    let low = u32::try_from(GENERATION_ID.0).unwrap_or(u32::MAX);
    let generation = bytes_of(&Device::new(
        Path::new("VGEN"),
        vec![
            &Name::new("_HID".into(), &"KILN0001"),
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("ADDR".into(), &Package::new(vec![&low, &0_u32])),
        ],
    ));
    body.extend(Scope::raw(Path::new("\\_SB_"), generation));
    let events = bytes_of(&Device::new(
        Path::new("GED_"),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &0_u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Interrupt::new(true, true, false, false, GENERATION_INTERRUPT)]),
            ),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![&If::new(
                    &Equal::new(&Arg(0), &GENERATION_INTERRUPT),
                    vec![&Notify::new(&Path::new("\\_SB_.VGEN"), &0x80_u8)],
                )],
            ),
        ],
    ));
    body.extend(Scope::raw(Path::new("\\_SB_"), events));

    for index in 0..devices {
        let (window, interrupt) = place(index).ok_or(AcpiError::TooManyDevices(devices))?;
        let base = u32::try_from(window.0).map_err(|_| AcpiError::TooManyDevices(devices))?;
        let length = u32::try_from(WINDOW_BYTES).unwrap_or(u32::MAX);
        let number = u8::try_from(index).map_err(|_| AcpiError::TooManyDevices(devices))?;
        let device = bytes_of(&Device::new(
            Path::new(&format!("V{index:03}")),
            vec![
                &Name::new("_HID".into(), &"LNRO0005"),
                &Name::new("_UID".into(), &number),
                &Name::new("_CCA".into(), &1_u8),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &Memory32Fixed::new(true, base, length),
                        &Interrupt::new(true, true, false, false, interrupt),
                    ]),
                ),
            ],
        ));
        body.extend(Scope::raw(Path::new("\\_SB_"), device));
    }
    body.extend(bytes_of(&Name::new("_S5_".into(), &Package::new(vec![&serial::OFF]))));

    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM, TABLE, REVISION);
    table.append_slice(&body);
    Ok(table.as_slice().to_vec())
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let mut table = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .flag(Flags::HwReducedAcpi)
        .preferred_pm_profile(PmProfile::Unspecified);
    table.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    table.sleep_control_reg = port(serial::POWER_PORT);
    table.sleep_status_reg = port(serial::POWER_PORT + 1);
    table.reset_reg = port(serial::POWER_PORT + 2);
    table.reset_value = serial::RESET_VALUE;
    table.hypervisor_vendor_identity = u64::from_le_bytes(TABLE).into();
    bytes_of(&table.finalize())
}

fn madt(cpus: u8) -> Vec<u8> {
    let mut table = MADT::new(OEM, TABLE, REVISION, LocalInterruptController::Address(LOCAL_APIC));
    for cpu in 0..cpus {
        table.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    table.add_structure(IoApic::new(cpus, IO_APIC, 0));
    bytes_of(&table)
}

/// Writes the tables of a machine with `cpus` processors and `devices` virtio-mmio devices, and returns where the first
/// one is.
///
/// # Errors
/// [`AcpiError`] where there are more of these than tables can name.
pub fn write(memory: &GuestMemoryMmap, cpus: u8, devices: usize) -> Result<GuestAddress, AcpiError> {
    let mut next = ACPI.0 + 64;
    let mut put = |bytes: &[u8]| {
        let at = next;
        let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        // The specification asks for no alignment; caches like it.
        next = at.saturating_add(length).next_multiple_of(16);
        if next > HIGH_MEMORY.0 {
            return Err(AcpiError::TooLarge(bytes.len()));
        }
        memory.write_slice(bytes, GuestAddress(at)).map_err(AcpiError::Write)?;
        Ok(at)
    };
    let dsdt = put(&dsdt(devices)?)?;
    let fadt = put(&fadt(dsdt))?;
    let madt = put(&madt(cpus))?;
    let mut table = XSDT::new(OEM, TABLE, REVISION);
    table.add_entry(fadt);
    table.add_entry(madt);
    let xsdt = put(&bytes_of(&table))?;
    memory.write_slice(&bytes_of(&Rsdp::new(OEM, xsdt)), ACPI).map_err(AcpiError::Write)?;
    Ok(ACPI)
}

// Every interrupt of a device is a pin of the controller's.
const _: () = assert!(FIRST_INTERRUPT as usize + MOST_DEVICES == IO_APIC_PINS as usize);

#[cfg(test)]
mod tests;
