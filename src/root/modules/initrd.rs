//! The modules that an initOS initrd needs: those without which no image is opened, and the drivers of whatever disk holds
//! it. `guest/init` loads the former by name and the latter as devices ask for them, by `modules.alias`.

use super::{Modules, ModulesError, normal_name};

/// Which machines an initrd is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// Virtual ones.
    Cloud,
    /// Any, with disks on SATA, NVMe, SAS, MMC and USB.
    Host,
}

/// What opens an image: it, its verity, the layer above it, and the partition that it lies on, with the tables that it is
/// mounted by (`VOLUME_OPTIONS` of `guest/init`).
const NEEDED: [&str; 8] =
    ["dm-verity", "efivarfs", "loop", "nls_ascii", "nls_cp437", "overlay", "squashfs", "vfat"];

/// Where a kernel has them: the quick hash, and disks that virtual machines have.
const WHERE_THERE: [&str; 14] = [
    "ahci",
    "hv_storvsc",
    "nvme",
    "pci-hyperv",
    "sd_mod",
    "sha256-ssse3",
    "simpledrm",
    "virtio_blk",
    "virtio_console",
    "virtio_pci",
    "virtio_scsi",
    "vmd",
    "vmw_pvscsi",
    "xen-blkfront",
];

/// The same for other machines.
const ON_HOSTS: [&str; 8] =
    ["aacraid", "hpsa", "megaraid_sas", "mmc_block", "mpt3sas", "smartpqi", "mptsas", "mptspi"];

/// Folders of controllers of which a host may have any: 1.6 MiB of Debian's 6.12, compressed.
const FOLDERS_ON_HOSTS: [&str; 4] = [
    "kernel/drivers/ata/",
    "kernel/drivers/mmc/host/",
    "kernel/drivers/usb/host/",
    "kernel/drivers/usb/storage/",
];

impl Modules {
    /// The files of an initrd's modules, by path below the folder of modules, each once and after all that it needs.
    ///
    /// # Errors
    /// [`ModulesError::Unknown`] of a module without which no image can be opened, [`ModulesError::Cycle`].
    pub fn for_initrd(&self, profile: Profile) -> Result<Vec<&str>, ModulesError> {
        let mut wanted: Vec<&str> = NEEDED.to_vec();
        let mut optional: Vec<&str> = WHERE_THERE.to_vec();
        if profile == Profile::Host {
            optional.extend(ON_HOSTS);
            let is_within = |path: &str| FOLDERS_ON_HOSTS.iter().any(|folder| path.starts_with(folder));
            let found = self.modules.iter().filter(|(_, module)| is_within(&module.path));
            optional.extend(found.map(|(name, _)| name.as_str()));
        }
        wanted.extend(optional.into_iter().filter(|name| self.modules.contains_key(&normal_name(name))));
        self.load_order(&wanted)
    }

    /// Of these modules those that have one of the `files`. What `depmod_files` gives of them is the index of an initrd.
    #[must_use]
    pub fn only(&self, files: &[&str]) -> Self {
        let mut kept = self.clone();
        kept.modules.retain(|_, module| files.contains(&module.path.as_str()));
        kept
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of Debian's 6.12 for clouds, and of what it has built in.
    const CLOUD: &str = "\
kernel/arch/x86/crypto/sha256-ssse3.ko.xz:
kernel/fs/nls/nls_cp437.ko.xz:
kernel/fs/nls/nls_ascii.ko.xz:
kernel/fs/squashfs/squashfs.ko.xz:
kernel/fs/fat/fat.ko.xz:
kernel/fs/fat/vfat.ko.xz: kernel/fs/fat/fat.ko.xz
kernel/fs/overlayfs/overlay.ko.xz:
kernel/fs/efivarfs/efivarfs.ko.xz:
kernel/drivers/block/loop.ko.xz:
kernel/drivers/block/virtio_blk.ko.xz:
kernel/drivers/net/virtio_net.ko.xz:
kernel/lib/reed_solomon/reed_solomon.ko.xz:
kernel/drivers/md/dm-mod.ko.xz:
kernel/drivers/md/dm-bufio.ko.xz: kernel/drivers/md/dm-mod.ko.xz
kernel/drivers/md/dm-verity.ko.xz: kernel/drivers/md/dm-bufio.ko.xz kernel/drivers/md/dm-mod.ko.xz kernel/lib/reed_solomon/reed_solomon.ko.xz
";
    const CLOUD_BUILTIN: &str = "kernel/drivers/nvme/host/nvme.ko\nkernel/drivers/virtio/virtio_pci.ko\n";
    /// What the one for any machine has beside these.
    const HOST: &str = "\
kernel/drivers/nvme/common/nvme-auth.ko.xz:
kernel/drivers/nvme/host/nvme-core.ko.xz: kernel/drivers/nvme/common/nvme-auth.ko.xz
kernel/drivers/nvme/host/nvme.ko.xz: kernel/drivers/nvme/host/nvme-core.ko.xz kernel/drivers/nvme/common/nvme-auth.ko.xz
kernel/drivers/scsi/scsi_common.ko.xz:
kernel/drivers/scsi/scsi_mod.ko.xz: kernel/drivers/scsi/scsi_common.ko.xz
kernel/drivers/scsi/sd_mod.ko.xz: kernel/drivers/scsi/scsi_mod.ko.xz kernel/drivers/scsi/scsi_common.ko.xz
kernel/drivers/scsi/lpfc/lpfc.ko.xz: kernel/drivers/scsi/scsi_mod.ko.xz
kernel/drivers/ata/libata.ko.xz: kernel/drivers/scsi/scsi_mod.ko.xz
kernel/drivers/ata/ata_piix.ko.xz: kernel/drivers/ata/libata.ko.xz
kernel/drivers/usb/common/usb-common.ko.xz:
kernel/drivers/usb/core/usbcore.ko.xz: kernel/drivers/usb/common/usb-common.ko.xz
kernel/drivers/usb/host/xhci-pci.ko.xz: kernel/drivers/usb/core/usbcore.ko.xz
kernel/drivers/usb/serial/usbserial.ko.xz: kernel/drivers/usb/core/usbcore.ko.xz
kernel/drivers/usb/storage/usb-storage.ko.xz: kernel/drivers/scsi/scsi_mod.ko.xz kernel/drivers/usb/core/usbcore.ko.xz
kernel/drivers/mmc/core/mmc_core.ko.xz:
kernel/drivers/mmc/core/mmc_block.ko.xz: kernel/drivers/mmc/core/mmc_core.ko.xz
kernel/drivers/mmc/host/sdhci-pci.ko.xz: kernel/drivers/mmc/core/mmc_core.ko.xz
";

    fn position(files: &[&str], name: &str) -> Option<usize> {
        files.iter().position(|file| normal_name(file) == name)
    }

    #[test]
    fn a_virtual_machine_gets_what_opens_an_image_and_no_network() {
        let modules = Modules::from_dep(CLOUD, CLOUD_BUILTIN).expect("modules");
        let files = modules.for_initrd(Profile::Cloud).expect("all are there");
        assert_eq!(files.len(), 14, "{files:?}");
        assert!(position(&files, "dm_mod") < position(&files, "dm_bufio"));
        assert!(position(&files, "dm_bufio") < position(&files, "dm_verity"));
        assert!(position(&files, "fat") < position(&files, "vfat"));
        assert_eq!(position(&files, "virtio_net"), None);
        assert_eq!(modules.for_initrd(Profile::Host).as_ref(), Ok(&files), "there is no more of it");
    }

    #[test]
    fn a_host_gets_each_controller_and_what_it_needs_once() {
        let modules = Modules::from_dep(&format!("{CLOUD}{HOST}"), "").expect("modules");
        let files = modules.for_initrd(Profile::Host).expect("all are there");
        for name in ["nvme", "ata_piix", "xhci_pci", "usb_storage", "mmc_block", "sdhci_pci", "sd_mod"] {
            assert!(position(&files, name).is_some(), "{name} in {files:?}");
        }
        for name in ["lpfc", "usbserial", "virtio_net"] {
            assert_eq!(position(&files, name), None, "{name}");
        }
        assert!(position(&files, "nvme_auth") < position(&files, "nvme_core"));
        let mut once = files.clone();
        once.sort_unstable();
        once.dedup();
        assert_eq!(once.len(), files.len());
        let cloud = modules.for_initrd(Profile::Cloud).expect("all are there");
        assert_eq!(position(&cloud, "usb_storage"), None);
    }

    #[test]
    fn a_kernel_that_cannot_open_an_image_is_refused() {
        let without: String = CLOUD
            .lines()
            .filter(|line| !line.contains("squashfs"))
            .fold(String::new(), |text, line| text + line + "\n");
        let modules = Modules::from_dep(&without, "").expect("modules");
        let error = modules.for_initrd(Profile::Cloud).expect_err("it has no squashfs");
        assert!(matches!(&error, ModulesError::Unknown { name, .. } if name == "squashfs"), "{error}");
    }

    #[test]
    fn what_a_kernel_has_built_in_it_need_not_have_as_a_module() {
        // The tables of names alone, as with `CONFIG_NLS_ASCII=y`, and all of it.
        let (tables, others): (Vec<&str>, Vec<&str>) = CLOUD.lines().partition(|line| line.contains("/nls_"));
        let builtin = tables.join("\n").replace(".ko.xz:", ".ko");
        let modules = Modules::from_dep(&others.join("\n"), &builtin).expect("modules");
        let files = modules.for_initrd(Profile::Cloud).expect("the kernel has the rest");
        assert_eq!(files.len(), 12, "{files:?}");
        let builtin = NEEDED.map(|name| format!("kernel/{name}.ko\n")).concat();
        let modules = Modules::from_dep("", &builtin).expect("modules");
        assert_eq!(modules.for_initrd(Profile::Host), Ok(Vec::new()));
        // And what it has in neither way is told.
        let modules = Modules::from_dep(&others.join("\n"), "").expect("modules");
        let error = modules.for_initrd(Profile::Cloud).expect_err("it has no tables");
        assert!(matches!(&error, ModulesError::Unknown { name, .. } if name == "nls_ascii"), "{error}");
    }

    #[test]
    fn the_index_of_an_initrd_names_its_own_files_alone() {
        let modules = Modules::from_dep(&format!("{CLOUD}{HOST}"), "").expect("modules");
        let files = modules.for_initrd(Profile::Cloud).expect("all are there");
        let index = modules.only(&files).depmod_files().expect("what they need is with them");
        let dep = index.iter().find(|(name, _)| *name == "modules.dep").expect("it is made");
        let dep = String::from_utf8(dep.1.clone()).expect("text");
        assert_eq!(dep.lines().count(), files.len());
        assert!(dep.contains("dm-verity") && !dep.contains("usb"));
    }
}
