//! How the machine is: processors, memory, graphics processors, the disk that holds the models.
//!
//! Read once a second, beside the runtime: drivers may take their time. What a system does not tell is left unknown.

use std::path::{Path, PathBuf};

use nvml_wrapper::Nvml;
use olol_proto::v1::Gpu;
use sysinfo::{CpuRefreshKind, MemoryRefreshKind, RefreshKind, System};
use tokio::time::{Duration, Instant};

use crate::models::store::Store;

/// Graphics processors that are told of; more are in no machine.
const MOST_GPUS: usize = 64;
/// Time between two tries to find NVIDIA's library, which may come with a driver after us.
const LOOK_FOR_NVIDIA: Duration = Duration::from_secs(60);

/// What was read.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Reading {
    /// Share of all processors in use, 0 to 1.
    pub(super) cpu: Option<f32>,
    /// Bytes of main memory in use; 0: unknown.
    pub(super) memory_used: u64,
    /// Bytes of main memory; 0: unknown.
    pub(super) memory_total: u64,
    /// Graphics processors.
    pub(super) gpus: Vec<Gpu>,
    /// Bytes free for models; 0: unknown.
    pub(super) disk_free: u64,
    /// Bytes of models that have begun to come.
    pub(super) disk_begun: u64,
}

/// What reads it.
pub(super) struct Machine {
    system: System,
    nvidia: Nvidia,
    /// Where the graphics processors of this machine stand in the file system.
    drm: PathBuf,
    /// Whether the share of the processors is known: it is one between two readings.
    has_begun: bool,
}

impl Machine {
    /// The machine that this is.
    pub(super) fn this() -> Self {
        Self::with_drm(Path::new("/sys/class/drm"))
    }

    fn with_drm(drm: &Path) -> Self {
        let what = RefreshKind::nothing()
            .with_cpu(CpuRefreshKind::nothing().with_cpu_usage())
            .with_memory(MemoryRefreshKind::nothing().with_ram());
        let system = System::new_with_specifics(what);
        Self { system, nvidia: Nvidia::Unknown, drm: drm.to_owned(), has_begun: false }
    }

    /// Reads everything. `models`: the folder that holds the models, if it is on this machine.
    pub(super) fn read(&mut self, models: Option<&Path>) -> Reading {
        self.system.refresh_cpu_usage();
        self.system.refresh_memory_specifics(MemoryRefreshKind::nothing().with_ram());
        let cpu = std::mem::replace(&mut self.has_begun, true).then(|| self.system.global_cpu_usage() / 100.0);
        let (memory_used, memory_total) = (self.system.used_memory(), self.system.total_memory());
        let mut gpus = self.nvidia.read();
        gpus.extend(amd(&self.drm));
        if cfg!(target_os = "macos") {
            gpus.push(apple(&self.system));
        }
        gpus.truncate(MOST_GPUS);
        Reading {
            cpu: cpu.filter(|share| share.is_finite()).map(|share| share.clamp(0.0, 1.0)),
            memory_used,
            memory_total,
            gpus,
            disk_free: models.and_then(free).map_or(0, known),
            disk_begun: models.map_or(0, |models| Store::at(models).begun()),
        }
    }
}

/// NVIDIA's library.
enum Nvidia {
    /// Nobody has looked yet.
    Unknown,
    Absent {
        since: Instant,
    },
    Here(Box<Nvml>),
}

impl Nvidia {
    fn read(&mut self) -> Vec<Gpu> {
        let is_due = match self {
            Self::Unknown => true,
            Self::Absent { since } => since.elapsed() >= LOOK_FOR_NVIDIA,
            Self::Here(_) => false,
        };
        if is_due {
            *self = Self::find();
        }
        let Self::Here(nvml) = self else { return Vec::new() };
        // A driver that was exchanged under us tells nothing any more; its successor is looked for later.
        let Ok(count) = nvml.device_count() else {
            *self = Self::Absent { since: Instant::now() };
            return Vec::new();
        };
        (0..count).filter_map(|index| nvidia(nvml, index)).take(MOST_GPUS).collect()
    }

    fn find() -> Self {
        // The name without a version comes with the headers only.
        let names: &[&str] = if cfg!(windows) { &["nvml.dll"] } else { &["libnvidia-ml.so.1", "libnvidia-ml.so"] };
        let found = names.iter().find_map(|name| Nvml::builder().lib_path(name.as_ref()).init().ok());
        found.map_or_else(|| Self::Absent { since: Instant::now() }, |nvml| Self::Here(Box::new(nvml)))
    }
}

fn nvidia(nvml: &Nvml, index: u32) -> Option<Gpu> {
    let device = nvml.device_by_index(index).ok()?;
    // Where processor and graphics processor have their memory in common, there is none of its own to tell of.
    let (total, free) = device.memory_info().map_or((0, 0), |memory| (memory.total, memory.free));
    #[expect(clippy::cast_precision_loss, reason = "a percentage")]
    let utilization = device.utilization_rates().map_or(-1.0, |rates| rates.gpu.min(100) as f32 / 100.0);
    Some(Gpu {
        name: device.name().unwrap_or_else(|_| "NVIDIA".to_owned()),
        kind: "cuda".to_owned(),
        memory_total_bytes: total,
        memory_free_bytes: free,
        utilization,
    })
}

/// AMD's graphics processors, as the kernel tells of them.
fn amd(drm: &Path) -> Vec<Gpu> {
    let Ok(entries) = std::fs::read_dir(drm) else { return Vec::new() };
    // `card0` is a card, `card0-DP-1` a socket on it.
    let number = |entry: &std::fs::DirEntry| entry.file_name().to_str()?.strip_prefix("card")?.parse::<u32>().ok();
    let mut cards: Vec<(u32, PathBuf)> =
        entries.flatten().filter_map(|entry| Some((number(&entry)?, entry.path().join("device")))).collect();
    cards.sort();
    cards.iter().filter_map(|(_, device)| amd_card(device)).take(MOST_GPUS).collect()
}

fn amd_card(device: &Path) -> Option<Gpu> {
    let text = |name: &str| std::fs::read_to_string(device.join(name)).ok().map(|text| text.trim().to_owned());
    let number = |name: &str| text(name)?.parse::<u64>().ok();
    let total = number("mem_info_vram_total").filter(|total| *total > 0)?;
    let used = number("mem_info_vram_used").unwrap_or(0);
    let name = text("product_name").filter(|name| !name.is_empty());
    #[expect(clippy::cast_precision_loss, reason = "a percentage")]
    let utilization = number("gpu_busy_percent").map_or(-1.0, |percent| percent.min(100) as f32 / 100.0);
    Some(Gpu {
        name: name.or_else(|| text("device").map(|id| format!("AMD {id}"))).unwrap_or_else(|| "AMD".to_owned()),
        kind: "rocm".to_owned(),
        memory_total_bytes: total,
        memory_free_bytes: total.saturating_sub(used),
        utilization,
    })
}

/// Apple's chips have one memory for everything.
fn apple(system: &System) -> Gpu {
    let name = system.cpus().first().map(|cpu| cpu.brand().to_owned()).filter(|name| !name.is_empty());
    Gpu {
        name: name.unwrap_or_else(|| "Apple".to_owned()),
        kind: "metal".to_owned(),
        memory_total_bytes: system.total_memory(),
        memory_free_bytes: system.total_memory().saturating_sub(system.used_memory()),
        utilization: -1.0,
    }
}

/// Bytes that are free on the disk of a folder, for who is not its administrator.
#[cfg(unix)]
pub(super) fn free(folder: &Path) -> Option<u64> {
    let disk = rustix::fs::statvfs(folder).ok()?;
    Some(disk.f_bavail.saturating_mul(disk.f_frsize))
}

/// Bytes that are known to be free, as they are told: none would be taken for what is not known.
fn known(free: u64) -> u64 {
    free.max(1)
}

#[cfg(not(unix))]
pub(super) fn free(_folder: &Path) -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A card, as the kernel tells of it.
    fn card(drm: &Path, name: &str, files: &[(&str, &str)]) {
        let device = drm.join(name).join("device");
        std::fs::create_dir_all(&device).unwrap();
        for (file, text) in files {
            std::fs::write(device.join(file), format!("{text}\n")).unwrap();
        }
    }

    #[test]
    fn cards_of_amd_are_read_in_their_order() {
        let drm = tempfile::tempdir().unwrap();
        let drm = drm.path();
        card(drm, "card10", &[("mem_info_vram_total", "1000"), ("device", "0x744c")]);
        card(
            drm,
            "card2",
            &[
                ("mem_info_vram_total", "17163091968"),
                ("mem_info_vram_used", "163091968"),
                ("gpu_busy_percent", "42"),
                ("product_name", "Radeon RX 7800 XT"),
            ],
        );
        // Another maker's card, a socket, and a card that tells nonsense.
        card(drm, "card0", &[("vendor", "0x8086")]);
        card(drm, "card2-DP-1", &[("mem_info_vram_total", "5")]);
        card(drm, "card3", &[("mem_info_vram_total", "much")]);
        let gpus = amd(drm);
        let first = Gpu {
            name: "Radeon RX 7800 XT".into(),
            kind: "rocm".into(),
            memory_total_bytes: 17_163_091_968,
            memory_free_bytes: 17_000_000_000,
            utilization: 0.42,
        };
        assert_eq!(gpus[0], first);
        assert_eq!((gpus[1].name.as_str(), gpus[1].memory_free_bytes, gpus[1].utilization), ("AMD 0x744c", 1000, -1.0));
        assert_eq!(gpus.len(), 2);
        assert!(amd(&drm.join("nowhere")).is_empty());
    }

    #[test]
    fn a_machine_tells_its_memory_and_its_disk() {
        let drm = tempfile::tempdir().unwrap();
        let mut machine = Machine::with_drm(drm.path());
        assert_eq!(machine.read(None).cpu, None, "a share is one between two readings");
        let reading = machine.read(Some(drm.path()));
        assert!(reading.memory_used > 0 && reading.memory_used < reading.memory_total, "{reading:?}");
        assert!(reading.cpu.is_some_and(|share| (0.0..=1.0).contains(&share)), "{reading:?}");
        assert!(reading.disk_free > 0, "{reading:?}");
        assert_eq!(machine.read(Some(Path::new("/nowhere"))).disk_free, 0);
        assert_eq!((known(0), known(5)), (1, 5), "a full disk is not an unknown one");
    }
}
