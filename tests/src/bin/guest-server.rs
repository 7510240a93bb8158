//! Runs inside a guest and does what the harness asks over the virtio serial port: see
//! `tidemark_tests::vm::protocol`.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tidemark_tests::vm::protocol::{
    Bytes, FromGuest, OUTPUT_BYTES_MAX, Output, PIECE_BYTES_MAX, PORT, ToGuest,
};

/// How long output is still gathered after a program's end: something it started may hold the pipe open.
const LAST_OUTPUT: Duration = Duration::from_millis(500);

fn main() -> Result<()> {
    let port = OpenOptions::new().read(true).write(true).open(PORT).with_context(|| PORT)?;
    let server = Arc::new(Server {
        port: Mutex::new(port.try_clone()?),
        running: Mutex::new(HashMap::new()),
    });
    server.port.lock().unwrap_or_else(PoisonError::into_inner).write_all(b"\n")?;
    server.say(&FromGuest::Hello);
    let mut lines = BufReader::with_capacity(256 << 10, port);
    let mut line = Vec::new();
    loop {
        line.clear();
        if lines.read_until(b'\n', &mut line)? == 0 {
            // The other end is not connected at the moment.
            thread::sleep(Duration::from_millis(50));
            continue;
        }
        if let Ok(request) = serde_json::from_slice(&line) {
            let server = Arc::clone(&server);
            thread::spawn(move || server.answer(request));
        }
    }
}

struct Server {
    port: Mutex<File>,
    /// The process groups of the programs that run, by request.
    running: Mutex<HashMap<u64, Pid>>,
}

impl Server {
    fn say(&self, message: &FromGuest) {
        let Ok(mut line) = serde_json::to_vec(message) else { return };
        line.push(b'\n');
        let mut port = self.port.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = port.write_all(&line) {
            eprintln!("guest-server: cannot answer: {error}");
        }
    }

    fn answer(&self, request: ToGuest) {
        let (id, answer) = match request {
            ToGuest::Run { id, arguments, input, timeout_ms } => {
                let timeout = Duration::from_millis(timeout_ms);
                (
                    id,
                    self.run(id, &arguments, input, timeout)
                        .map(|output| FromGuest::Ended { id, output }),
                )
            }
            ToGuest::Signal { id, signal } => return self.signal(id, signal),
            ToGuest::Write { id, path, data, append, mode } => (
                id,
                write(Path::new(&path), &data, append, mode).map(|()| FromGuest::Written { id }),
            ),
            ToGuest::Read { id, path, offset_bytes } => {
                let piece = read(Path::new(&path), offset_bytes);
                (id, piece.map(|data| FromGuest::Piece { id, data: Bytes(data) }))
            }
        };
        let failed = |error| FromGuest::Failed { id, reason: format!("{error:#}") };
        self.say(&answer.unwrap_or_else(failed));
    }

    fn run(
        &self,
        id: u64,
        arguments: &[String],
        input: Bytes,
        timeout: Duration,
    ) -> Result<Output> {
        let (program, arguments) = arguments.split_first().context("no program is named")?;
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {program}"))?;
        let group = Pid::from_raw(child.id().cast_signed());
        self.running.lock().unwrap_or_else(PoisonError::into_inner).insert(id, group);
        if let Some(mut stdin) = child.stdin.take() {
            // A program that does not read its input is no error.
            thread::spawn(move || stdin.write_all(&input.0));
        }
        let (stdout, stderr) = (gather(child.stdout.take()), gather(child.stderr.take()));
        let timed_out = !wait(&mut child, timeout)?;
        if timed_out {
            let _ = killpg(group, Signal::SIGKILL);
        }
        let status = child.wait()?;
        self.running.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        let deadline = Instant::now() + LAST_OUTPUT;
        let (stdout, stderr) = (stdout.take(deadline), stderr.take(deadline));
        Ok(Output { status: status.code(), signal: status.signal(), timed_out, stdout, stderr })
    }

    fn signal(&self, id: u64, signal: i32) {
        let group = self.running.lock().unwrap_or_else(PoisonError::into_inner).get(&id).copied();
        if let (Some(group), Ok(signal)) = (group, Signal::try_from(signal)) {
            let _ = killpg(group, signal);
        }
    }
}

/// Waits for the child's end; false if it still runs at the time limit.
fn wait(child: &mut Child, timeout: Duration) -> io::Result<bool> {
    let start = Instant::now();
    let mut pause = Duration::from_millis(1);
    while start.elapsed() < timeout {
        if child.try_wait()?.is_some() {
            return Ok(true);
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
    Ok(child.try_wait()?.is_some())
}

/// One output stream of a program, read by a thread of its own.
struct Stream {
    bytes: Arc<Mutex<Vec<u8>>>,
    reader: Option<thread::JoinHandle<()>>,
}

fn gather(from: Option<impl Read + Send + 'static>) -> Stream {
    let bytes = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&bytes);
    let reader = from.map(|mut from| {
        thread::spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            while let Ok(count @ 1..) = from.read(&mut buffer) {
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                let room = OUTPUT_BYTES_MAX.saturating_sub(kept.len());
                kept.extend(buffer.iter().take(count.min(room)));
            }
        })
    });
    Stream { bytes, reader }
}

impl Stream {
    fn take(self, deadline: Instant) -> Bytes {
        while self.reader.as_ref().is_some_and(|reader| !reader.is_finished())
            && Instant::now() < deadline
        {
            thread::sleep(Duration::from_millis(2));
        }
        Bytes(std::mem::take(&mut *self.bytes.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

fn write(path: &Path, data: &Bytes, append: bool, mode: u32) -> Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let mut options = OpenOptions::new();
    options.create(true).write(true).mode(mode);
    if append {
        options.append(true);
    } else {
        // A program that runs cannot be written to, but it can be replaced.
        let _ = fs::remove_file(path);
        options.truncate(true);
    }
    let mut file = options.open(path).with_context(|| path.display().to_string())?;
    file.write_all(&data.0)?;
    file.set_permissions(Permissions::from_mode(mode))?;
    Ok(())
}

fn read(path: &Path, offset_bytes: u64) -> Result<Vec<u8>> {
    let mut file = File::open(path).with_context(|| path.display().to_string())?;
    file.seek(SeekFrom::Start(offset_bytes))?;
    let mut piece = Vec::new();
    file.take(PIECE_BYTES_MAX as u64).read_to_end(&mut piece)?;
    Ok(piece)
}
