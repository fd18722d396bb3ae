//! What initOS's programs say: a line in the kernel's log, and on a virtio console where there is one.

use std::fs::File;
use std::io::Write;

/// Says one line.
pub fn say(text: &str) {
    // The kernel counts lines of each opening, and drops those beyond ten in five seconds. The priority is that of
    // warnings: a quiet kernel shows them from level 5 on.
    if let Ok(mut log) = File::options().write(true).open("/dev/kmsg") {
        let _ = log.write_all(format!("<4>INITOS: {text}\n").as_bytes());
    }
    if let Ok(mut port) = File::options().write(true).open("/dev/hvc0") {
        let _ = port.write_all(format!("INITOS: {text}\r\n").as_bytes());
    }
}
