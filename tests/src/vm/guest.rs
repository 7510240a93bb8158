//! One guest: configured, booted, asked to do things, cut off from power.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::channel::{Channel, Pending};
use super::hardware::{Disk, Hardware};
use super::network::NetworkEnd;
use super::protocol::{Bytes, FromGuest, Output, PIECE_BYTES_MAX, ToGuest};
use super::{Lab, emulator, initramfs, tail};

/// How long a command may take if the caller states nothing else.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(120);
/// How long a guest may take to come up or to go down; it takes seconds on an idle machine.
const BOOT_TIMEOUT: Duration = Duration::from_secs(240);
/// What the host waits longer than the guest, which ends an overdue command by itself.
const ANSWER_MARGIN: Duration = Duration::from_secs(30);
/// How long one piece of a file may take.
const PIECE_TIMEOUT: Duration = Duration::from_secs(60);

/// A guest's configuration. By default: fast, virtio, one processor, 1 GiB of memory.
pub struct GuestBuilder<'a> {
    lab: &'a Lab,
    name: String,
    debian: bool,
    hardware: Hardware,
    processors: u32,
    memory_mib: u32,
    disks: Vec<Disk>,
    ends: Vec<NetworkEnd>,
    programs: Vec<PathBuf>,
}

impl<'a> GuestBuilder<'a> {
    pub(super) fn new(lab: &'a Lab, name: &str) -> GuestBuilder<'a> {
        GuestBuilder {
            lab,
            name: name.to_owned(),
            debian: false,
            hardware: Hardware::Virtio,
            processors: 1,
            memory_mib: 1024,
            disks: Vec::new(),
            ends: Vec::new(),
            programs: Vec::new(),
        }
    }

    /// A whole Debian system instead of busybox. Its root is the first disk (`vda` or `sda`).
    pub fn debian(mut self) -> Self {
        self.debian = true;
        self
    }

    /// The kind of disks and network cards.
    pub fn hardware(mut self, hardware: Hardware) -> Self {
        self.hardware = hardware;
        self
    }

    /// The number of processors.
    pub fn processors(mut self, count: u32) -> Self {
        self.processors = count;
        self
    }

    /// The memory.
    pub fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// Adds a disk.
    pub fn disk(mut self, disk: Disk) -> Self {
        self.disks.push(disk);
        self
    }

    /// Adds a network card at this end of a network.
    pub fn network(mut self, end: &NetworkEnd) -> Self {
        self.ends.push(end.clone());
        self
    }

    /// Adds a program of this machine to a fast guest's `/bin`, with the libraries it needs. Into a Debian
    /// guest programs are copied when it runs: [`Guest::copy_in`].
    pub fn program(mut self, path: &Path) -> Self {
        self.programs.push(path.to_owned());
        self
    }

    /// Makes the guest's files and starts it; returns when it takes commands, a Debian guest when systemd has
    /// started all it is to start.
    pub fn boot(self) -> Result<Guest> {
        let lab = self.lab;
        let directory = &lab.directory;
        let memory_disk = directory.join(format!("{}.cpio", self.name));
        let mut modules = match self.hardware {
            Hardware::Virtio => initramfs::VIRTIO.to_vec(),
            Hardware::Vmware => initramfs::VMWARE.to_vec(),
        };
        let mut disks = self.disks;
        if self.debian {
            let overlay = directory.join(format!("{}.qcow2", self.name));
            make_overlay(&overlay, &lab.cache.debian_image()?)?;
            disks.insert(0, Disk::overlay(&overlay));
        } else {
            modules.extend(initramfs::COMMON);
        }
        let contents = initramfs::Contents { modules, programs: self.programs };
        initramfs::write(&memory_disk, &lab.shared_directory, &lab.kernel, &contents)?;

        let mut kernel_arguments =
            "console=ttyS0 quiet loglevel=4 panic=0 nowatchdog mitigations=off audit=0 apparmor=0 selinux=0 net.ifnames=0 \
             random.trust_cpu=on 8250.nr_uarts=1 nokaslr tsc=reliable no_timer_check cryptomgr.notests"
                .to_owned();
        if self.debian {
            kernel_arguments += " tidemark.debian";
        }
        for end in &self.ends {
            kernel_arguments = format!("{kernel_arguments} {}", end.kernel_argument());
        }
        let console = directory.join(format!("{}.log", self.name));
        let text = |path: &Path| path.display().to_string();
        let mut arguments = vec![
            "-nodefaults".to_owned(),
            "-no-user-config".to_owned(),
            "-display".to_owned(),
            "none".to_owned(),
            "-accel".to_owned(),
            "tcg,thread=multi".to_owned(),
            "-cpu".to_owned(),
            // Its AVX reads 32 bytes where an instruction (VINSERTF128) takes 16 from memory, and so beyond the
            // end of what is mapped. Some programs look for AVX2 alone.
            "max,-avx,-avx2".to_owned(),
            "-smp".to_owned(),
            self.processors.to_string(),
            "-m".to_owned(),
            self.memory_mib.to_string(),
            "-kernel".to_owned(),
            text(&lab.kernel.image),
            "-initrd".to_owned(),
            text(&memory_disk),
            "-append".to_owned(),
            kernel_arguments,
            "-chardev".to_owned(),
            format!("file,id=console,path={},append=on", text(&console)),
            "-serial".to_owned(),
            "chardev:console".to_owned(),
            "-device".to_owned(),
            "virtio-serial-pci".to_owned(),
            "-device".to_owned(),
            "virtserialport,chardev=server,name=server".to_owned(),
        ];
        arguments.extend(self.hardware.arguments(&disks, &self.ends));
        let mut guest = Guest {
            name: self.name,
            debian: self.debian,
            arguments,
            taps: self.ends.iter().map(NetworkEnd::tap).collect(),
            console,
            machine: None,
        };
        guest.power_on()?;
        Ok(guest)
    }
}

fn make_overlay(overlay: &Path, image: &Path) -> Result<()> {
    let output = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .args([image, overlay])
        .stdin(Stdio::null())
        .output()
        .context("cannot start qemu-img")?;
    if !output.status.success() {
        bail!("qemu-img: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// A machine that runs, or is off and can be switched on again with the same disks. Dropped, it ends as by a
/// power cut.
pub struct Guest {
    name: String,
    debian: bool,
    arguments: Vec<String>,
    /// What its network cards are plugged into.
    taps: Vec<Arc<OwnedFd>>,
    console: PathBuf,
    machine: Option<Machine>,
}

/// A QEMU process.
struct Machine {
    process: Child,
    channel: Channel,
}

/// A command that runs in a guest.
pub struct Job<'a> {
    guest: &'a Guest,
    pending: Pending,
    timeout: Duration,
    what: String,
}

impl Guest {
    /// Cuts the power: the process is killed where it stands. What the guest saw completed is on its disks,
    /// except for what only a guest's or a disk's cache held (a file's disk here has none that is lost).
    pub fn power_cut(&mut self) -> Result<()> {
        let mut machine = self.machine.take().context("the guest is off already")?;
        machine.process.kill()?;
        machine.process.wait()?;
        Ok(())
    }

    /// Switches the guest on and waits until it is up.
    pub fn power_on(&mut self) -> Result<()> {
        if self.machine.is_some() {
            bail!("the guest {} is on already", self.name);
        }
        let (ours, theirs) = UnixStream::pair()?;
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(&self.arguments)
            .args(["-chardev", &format!("socket,id=server,fd={}", theirs.as_raw_fd())])
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let mut keep = self.taps.clone();
        keep.push(Arc::new(theirs.into()));
        let process = emulator::start(command, keep)
            .context("cannot start qemu-system-x86_64: run `cargo xtask setup`")?;
        self.machine = Some(Machine { process, channel: Channel::new(ours)? });
        self.wait_up(0)
    }

    /// Restarts the system in an orderly way, in the same process, and waits until it is up again.
    pub fn reboot(&self) -> Result<()> {
        let starts = self.channel()?.starts();
        self.ask_for_end("reboot")?;
        self.wait_up(starts)
    }

    /// Ends the system in an orderly way and switches the guest off.
    pub fn shut_down(&mut self) -> Result<()> {
        self.ask_for_end("poweroff")?;
        let mut machine = self.machine.take().context("the guest is off already")?;
        let deadline = Instant::now() + BOOT_TIMEOUT;
        while machine.process.try_wait()?.is_none() {
            if Instant::now() > deadline {
                machine.process.kill()?;
                machine.process.wait()?;
                bail!("the guest {} has not shut down", self.name);
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Runs a shell script; its standard output, or an error with its standard error if it fails.
    pub fn sh(&self, script: &str) -> Result<String> {
        let output = self.run(script)?;
        if !output.success() {
            bail!(
                "in {}: {script}\nended with {}\n{}{}",
                self.name,
                how(&output),
                output.text(),
                output.error_text()
            );
        }
        Ok(output.text())
    }

    /// Runs a shell script, whatever its end.
    pub fn run(&self, script: &str) -> Result<Output> {
        self.spawn(script)?.wait()
    }

    /// Starts a shell script that may run for two minutes.
    pub fn spawn(&self, script: &str) -> Result<Job<'_>> {
        self.spawn_for(script, COMMAND_TIMEOUT)
    }

    /// Starts a shell script that is killed after `timeout`, with all it started.
    pub fn spawn_for(&self, script: &str, timeout: Duration) -> Result<Job<'_>> {
        self.start(&["sh", "-c", script], Vec::new(), timeout)
    }

    /// Starts a program with arguments and standard input.
    pub fn start(&self, arguments: &[&str], input: Vec<u8>, timeout: Duration) -> Result<Job<'_>> {
        let timeout_ms = u64::try_from(timeout.as_millis())?;
        let what = arguments.join(" ");
        let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        let pending = self.channel()?.request(|id| ToGuest::Run {
            id,
            arguments,
            input: Bytes(input),
            timeout_ms,
        })?;
        Ok(Job { guest: self, pending, timeout, what })
    }

    /// Writes a file in the guest.
    pub fn write(&self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        let mut pieces = content.chunks(PIECE_BYTES_MAX);
        let send = |piece: &[u8], append| {
            let request = self.channel()?.request(|id| ToGuest::Write {
                id,
                path: path.to_owned(),
                data: Bytes(piece.to_vec()),
                append,
                mode,
            })?;
            request.wait(PIECE_TIMEOUT).map(drop)
        };
        send(pieces.next().unwrap_or_default(), false)
            .and_then(|()| pieces.try_for_each(|piece| send(piece, true)))
            .with_context(|| format!("cannot write {path} in {}", self.name))
    }

    /// Reads a file of the guest.
    pub fn read(&self, path: &str) -> Result<Vec<u8>> {
        let mut content = Vec::new();
        loop {
            let offset_bytes = content.len() as u64;
            let request = self.channel()?.request(|id| ToGuest::Read {
                id,
                path: path.to_owned(),
                offset_bytes,
            })?;
            match request
                .wait(PIECE_TIMEOUT)
                .with_context(|| format!("cannot read {path} in {}", self.name))?
            {
                FromGuest::Piece { data: Bytes(piece), .. } if piece.is_empty() => {
                    return Ok(content);
                }
                FromGuest::Piece { data, .. } => content.extend(data.0),
                other => bail!("the guest answered a read with {other:?}"),
            }
        }
    }

    /// Copies a file, such as a program (see [`super::program`]), into the guest with its permissions.
    pub fn copy_in(&self, source: &Path, path: &str) -> Result<()> {
        let cannot = || format!("cannot read {}", source.display());
        let content = fs::read(source).with_context(cannot)?;
        let mode = fs::metadata(source).with_context(cannot)?.permissions().mode() & 0o7777;
        self.write(path, mode, &content)
    }

    /// Copies a file of the guest to this machine.
    pub fn copy_out(&self, path: &str, destination: &Path) -> Result<()> {
        fs::write(destination, self.read(path)?)
            .with_context(|| format!("cannot write {}", destination.display()))
    }

    /// The console's log so far: kernel messages of all starts.
    pub fn console(&self) -> Result<String> {
        Ok(String::from_utf8_lossy(&fs::read(&self.console)?).into_owned())
    }

    fn channel(&self) -> Result<&Channel> {
        let machine = self.machine.as_ref();
        Ok(&machine.with_context(|| format!("the guest {} is off", self.name))?.channel)
    }

    /// `how` is `reboot` or `poweroff`.
    fn ask_for_end(&self, how: &str) -> Result<()> {
        if self.debian {
            self.sh(&format!("systemctl --no-block {how}"))?;
        } else {
            // It has no answer: nothing outlives the command.
            drop(self.spawn(&format!("sync; {how} -f"))?);
        }
        Ok(())
    }

    fn wait_up(&self, starts: u64) -> Result<()> {
        let channel = self.channel()?;
        channel.wait_start(starts, BOOT_TIMEOUT).with_context(|| {
            format!(
                "the guest {} did not come up; its console:\n{}",
                self.name,
                tail(&self.console)
            )
        })?;
        if self.debian {
            // "degraded" is up as well: which units must not fail is for the tests to say.
            let ask = "systemctl is-system-running --wait; udevadm settle";
            let state = self.spawn_for(ask, BOOT_TIMEOUT)?.wait()?.text();
            if !["running", "degraded"].contains(&state.trim()) {
                bail!("systemd in {} is {:?} after the start", self.name, state.trim());
            }
        }
        Ok(())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if self.machine.is_some() {
            // It can only fail if the process has ended.
            let _ = self.power_cut();
        }
    }
}

impl Job<'_> {
    /// Waits for the end, which the time limit given at the start bounds.
    pub fn wait(self) -> Result<Output> {
        let answer = self
            .pending
            .wait(self.timeout + ANSWER_MARGIN)
            .with_context(|| format!("in {}: {}", self.guest.name, self.what))?;
        match answer {
            FromGuest::Ended { output, .. } => Ok(output),
            other => bail!("the guest answered a command with {other:?}"),
        }
    }

    /// Sends a signal to the program and all it started.
    pub fn signal(&self, signal: nix::sys::signal::Signal) -> Result<()> {
        self.guest.channel()?.send(&ToGuest::Signal { id: self.pending.id, signal: signal as i32 })
    }
}

fn how(output: &Output) -> String {
    match (output.timed_out, output.status, output.signal) {
        (true, ..) => "a time-out".to_owned(),
        (_, Some(status), _) => format!("status {status}"),
        (_, _, Some(signal)) => format!("signal {signal}"),
        _ => "no status".to_owned(),
    }
}
