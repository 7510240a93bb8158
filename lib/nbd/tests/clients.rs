//! The clients people use, over a Unix socket and TCP, in the clear and encrypted.
//!
//! A client program that is missing is a failure, with a sentence that says what to install.

#[path = "../examples/memory/disk.rs"]
mod disk;
mod support;

use std::ffi::OsStr;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use disk::MemoryExports;
use support::{Certificates, pattern};
use tempfile::TempDir;
use tidemark_nbd::{
    BoxFuture, ClientInfo, Export, ExportEntry, Exports, Limits, Listener, OpenError, Purpose,
    Server,
};
use tokio::process::Command;

const MIB: usize = 1 << 20;
/// Longest run of one client program.
const RUN: Duration = Duration::from_secs(120);

/// How a client reaches the server.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Unix,
    Tcp,
    UnixTls,
    TcpTls,
}

const WAYS: [Way; 4] = [Way::Unix, Way::Tcp, Way::UnixTls, Way::TcpTls];

/// Counts the connections that enter an export.
struct Counted(MemoryExports, Arc<AtomicUsize>);

impl Exports for Counted {
    fn list<'a>(&'a self, client: &'a ClientInfo) -> BoxFuture<'a, Vec<ExportEntry>> {
        self.0.list(client)
    }

    fn open<'a>(
        &'a self,
        name: &'a str,
        purpose: Purpose,
        client: &'a ClientInfo,
    ) -> BoxFuture<'a, Result<Arc<dyn Export>, OpenError>> {
        if purpose == Purpose::Transmission {
            self.1.fetch_add(1, SeqCst);
        }
        self.0.open(name, purpose, client)
    }
}

/// A server with an empty disk of 64 MiB, called `disk`.
struct Site {
    way: Way,
    directory: TempDir,
    certificates: Certificates,
    address: Option<SocketAddr>,
    entered: Arc<AtomicUsize>,
    server: Server,
}

impl Site {
    async fn start(way: Way) -> Self {
        let directory = TempDir::new().unwrap();
        let certificates = Certificates::make();
        let entered = Arc::<AtomicUsize>::default();
        let exports = Counted(MemoryExports::new(64 * MIB as u64), Arc::clone(&entered));
        let server = Server::new(Arc::new(exports), Limits::default());
        let listener = match way {
            Way::Unix | Way::UnixTls => {
                Listener::unix(directory.path().join("nbd.sock"), 0o666).await.unwrap()
            }
            Way::Tcp | Way::TcpTls => Listener::tcp("127.0.0.1:0").await.unwrap(),
        };
        let address = listener.tcp_address();
        let listener = match way {
            Way::Unix | Way::Tcp => listener.allow_plain_tcp(),
            Way::UnixTls | Way::TcpTls => listener.with_tls(certificates.required(true)),
        };
        let serving = server.clone();
        tokio::spawn(async move { serving.serve(listener).await.unwrap() });
        Self { way, directory, certificates, address, entered, server }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The URI that libnbd's programs take.
    fn uri(&self) -> String {
        let (socket, keys) = (self.path("nbd.sock"), self.certificates.path());
        let (socket, keys) = (socket.display(), keys.display());
        let port = self.address.map_or(0, |address| address.port());
        match self.way {
            Way::Unix => format!("nbd+unix:///disk?socket={socket}"),
            Way::Tcp => format!("nbd://localhost:{port}/disk"),
            Way::UnixTls => {
                format!("nbds+unix:///disk?socket={socket}&tls-certificates={keys}")
            }
            Way::TcpTls => format!("nbds://localhost:{port}/disk?tls-certificates={keys}"),
        }
    }

    /// The arguments by which qemu-img and qemu-io name the disk.
    fn qemu(&self) -> (Vec<String>, String) {
        let server = match self.address {
            Some(address) => format!(
                "server.type=inet,server.host={},server.port={}",
                address.ip(),
                address.port()
            ),
            None => format!("server.type=unix,server.path={}", self.path("nbd.sock").display()),
        };
        let mut options = format!("driver=nbd,export=disk,discard=unmap,{server}");
        let mut objects = Vec::new();
        if matches!(self.way, Way::UnixTls | Way::TcpTls) {
            let keys = self.certificates.path().display();
            objects.push("--object".to_owned());
            objects.push(format!("tls-creds-x509,id=tls0,endpoint=client,dir={keys}"));
            options.push_str(",tls-creds=tls0,tls-hostname=localhost");
        }
        (objects, options)
    }

    /// Runs a script in nbdsh, connected.
    async fn nbdsh(&self, script: &str) {
        let prepare = "h.add_meta_context('base:allocation'); h.set_uri_allow_local_file(True)";
        let connect = format!("h.connect_uri('{}')", self.uri());
        run("nbdsh", ["-c", prepare, "-c", &connect, "-c", script]).await;
    }

    /// An image of the disk's size with data, zeros and a hole.
    fn image(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        let data = pattern(11, 20 * MIB);
        let image = [&data[..], &vec![0; 24 * MIB], &data[..MIB], &vec![0; 19 * MIB]].concat();
        std::fs::write(&path, image).unwrap();
        path
    }
}

/// Runs a client program to its success; returns what it printed.
async fn run<A: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = A>) -> String {
    let mut command = Command::new(program);
    command.args(arguments);
    finish(program, command).await
}

async fn finish(program: &str, mut command: Command) -> String {
    // Debian's own python3, for nbdsh.
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").stdin(Stdio::null()).kill_on_drop(true);
    let output = match tokio::time::timeout(RUN, command.output()).await {
        Err(_) => panic!("{program} did not end within {RUN:?}"),
        Ok(Err(error)) => panic!(
            "{program} cannot be run ({error}): install libnbd-bin, python3-libnbd, qemu-utils, \
             fio and util-linux"
        ),
        Ok(Ok(output)) => output,
    };
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let complained = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program}: {}\n{said}\n{complained}", output.status);
    said
}

#[tokio::test(flavor = "multi_thread")]
async fn nbdinfo_shows_size_list_and_map() {
    for way in WAYS {
        let site = Site::start(way).await;
        assert_eq!(run("nbdinfo", ["--size", &site.uri()]).await.trim(), "67108864", "{way:?}");
        let list = run("nbdinfo", ["--list", &site.uri()]).await;
        for line in ["export=\"disk\":", "description: a disk in memory", "can_fast_zero: true"] {
            assert!(list.contains(line), "{way:?}: {list}");
        }
        assert_eq!(list.contains("with TLS"), matches!(way, Way::UnixTls | Way::TcpTls));
        site.nbdsh("h.pwrite(b'x' * 65536, 1 << 20)").await;
        let map = run("nbdinfo", ["--map", &site.uri()]).await;
        let rows: Vec<Vec<&str>> =
            map.lines().map(|line| line.split_whitespace().take(3).collect()).collect();
        let expected =
            [["0", "1048576", "3"], ["1048576", "65536", "0"], ["1114112", "65994752", "3"]];
        assert_eq!(rows, expected, "{way:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nbdcopy_copies_over_four_connections() {
    for way in WAYS {
        let site = Site::start(way).await;
        let (image, back) = (site.image("image"), site.path("back"));
        // It opens no more connections than it has threads.
        let (threads, connections) = ("--threads=4".to_owned(), "--connections=4".to_owned());
        let (from, to) = (image.display().to_string(), back.display().to_string());
        run("nbdcopy", [&threads, &connections, &from, &site.uri()]).await;
        assert_eq!(site.entered.swap(0, SeqCst), 4, "{way:?}");
        run("nbdcopy", [&threads, &connections, &site.uri(), &to]).await;
        assert_eq!(site.entered.load(SeqCst), 4, "{way:?}");
        assert!(std::fs::read(&image).unwrap() == std::fs::read(&back).unwrap(), "{way:?}");
        assert!(site.server.shutdown(RUN).await, "all have left");
    }
}

/// Every command through libnbd, and refusals with libnbd's own checks off.
const SCRIPT: &str = r#"
import errno
data = bytes(range(256)) * 256
h.pwrite(data, 4096, nbd.CMD_FLAG_FUA)
assert h.pread(len(data), 4096) == data
assert h.pread(len(data) + 8192, 0)[4096:-4096] == data
h.zero(4096, 8192)
assert h.pread(4096, 8192) == bytes(4096)
h.zero(4096, 8192, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO)
h.trim(65536, 1 << 20)
h.cache(65536, 0)
h.flush()
entries = []
h.block_status(1 << 20, 0, lambda context, offset, e, err: entries.extend(e), nbd.CMD_FLAG_REQ_ONE)
assert len(entries) == 2, entries
chunks = []
def chunk(buf, offset, status, err):
    chunks.append((offset, len(buf), status))
h.pread_structured(1 << 20, 0, chunk)
assert any(status == nbd.READ_HOLE for _, _, status in chunks), chunks
assert sum(length for _, length, _ in chunks) == 1 << 20
chunks.clear()
h.pread_structured(1 << 20, 0, chunk, nbd.CMD_FLAG_DF)
assert len(chunks) == 1, chunks
h.set_strict_mode(0)
size = h.get_size()
def refused(number, call):
    try:
        call()
    except nbd.Error as error:
        assert error.errnum == number, error
    else:
        raise AssertionError("not refused")
refused(errno.ENOSPC, lambda: h.pwrite(data, size - 512))
refused(errno.EINVAL, lambda: h.pread(1024, size - 512))
refused(errno.EINVAL, lambda: h.trim(1024, size - 512))
refused(errno.ENOSPC, lambda: h.zero(1024, size - 512))
refused(errno.EINVAL, lambda: h.pread(512, 0, nbd.CMD_FLAG_REQ_ONE))
assert h.pread(512, 0) == bytes(512)
pending = [h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray([n]) * 65536), n << 16) for n in range(200)]
while h.aio_in_flight() > 0:
    h.poll(-1)
for cookie in pending:
    assert h.aio_command_completed(cookie)
for n in range(200):
    assert h.pread(65536, n << 16) == bytes([n]) * 65536
"#;

#[tokio::test(flavor = "multi_thread")]
async fn nbdsh_finds_every_command_as_the_protocol_has_it() {
    for way in WAYS {
        let site = Site::start(way).await;
        site.nbdsh(SCRIPT).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_io_reads_back_what_it_wrote() {
    for way in WAYS {
        let site = Site::start(way).await;
        let (objects, options) = site.qemu();
        let commands = [
            "write -P 0x5a 0 8M",
            "write -f -P 0xa5 1M 64k",
            "write -z 2M 1M",
            "write -z -u 3M 1M",
            "discard 4M 1M",
            "flush",
            "read -P 0x5a 0 1M",
            "read -P 0xa5 1M 64k",
            "read -P 0 2M 2M",
            "read -P 0x5a 5M 3M",
            "read -P 0 63M 1M",
        ];
        let mut arguments = objects;
        arguments.extend(["--image-opts".to_owned(), options]);
        for command in commands {
            arguments.extend(["-c".to_owned(), command.to_owned()]);
        }
        let said = run("qemu-io", &arguments).await;
        assert!(!said.contains("verification failed"), "{way:?}: {said}");
        assert_eq!(said.matches("ops; ").count(), commands.len() - 1, "{way:?}: {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_img_converts_both_ways_and_compares() {
    for way in WAYS {
        let site = Site::start(way).await;
        let (objects, options) = site.qemu();
        let (image, back) = (site.image("image"), site.path("back"));
        let file = |path: &Path| format!("driver=raw,file.filename={}", path.display());
        let call = |words: &[&str]| {
            let mut arguments = vec![words[0].to_owned()];
            arguments.extend(objects.clone());
            arguments.extend(words[1..].iter().map(|word| (*word).to_owned()));
            arguments
        };
        let into =
            ["convert", "-n", "-W", "--image-opts", "--target-image-opts", &file(&image), &options];
        run("qemu-img", call(&into)).await;
        let compared = run("qemu-img", call(&["compare", "--image-opts", &options, &file(&image)]));
        assert!(compared.await.contains("identical"), "{way:?}");
        let out = ["convert", "--image-opts", "-O", "raw", &options, &back.display().to_string()];
        run("qemu-img", call(&out)).await;
        assert!(std::fs::read(&image).unwrap() == std::fs::read(&back).unwrap(), "{way:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fio_verifies_what_it_wrote_at_depth() {
    for way in WAYS {
        let site = Site::start(way).await;
        // fio takes no certificates in the URI: libnbd looks in the home directory, of a user who
        // is not root.
        let uri = site.uri();
        let uri = match way {
            Way::UnixTls => uri.split('&').next().unwrap().to_owned(),
            Way::TcpTls => uri.split('?').next().unwrap().to_owned(),
            Way::Unix | Way::Tcp => uri,
        };
        let home = site.path("home");
        let keys = home.join(".pki/libnbd");
        std::fs::create_dir_all(&keys).unwrap();
        for entry in std::fs::read_dir(site.certificates.path()).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), keys.join(entry.file_name())).unwrap();
        }
        open_to_all(site.directory.path());
        let root = nix::unistd::geteuid().is_root();
        let mut command = Command::new(if root { "setpriv" } else { "fio" });
        if root {
            command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "fio"]);
        }
        command.env("HOME", &home).current_dir(&home);
        command.args(["--ioengine=nbd", "--rw=randwrite", "--iodepth=32", "--thread"]);
        command.args(["--bsrange=512-64k", "--blockalign=512", "--size=64M", "--randseed=7"]);
        command.args(["--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--name=depth"]);
        command.args(["--verify_state_save=0", "--end_fsync=1", "--output-format=terse"]);
        command.arg(format!("--uri={uri}"));
        let said = finish("fio", command).await;
        let line = said.lines().find(|line| line.contains(";depth;")).unwrap_or_default();
        // Fields 5, 6 and 47 of a terse line: the error, KiB read (to verify), KiB written.
        let field = |number: usize| {
            line.split(';').nth(number - 1).and_then(|text| text.parse::<u64>().ok())
        };
        assert_eq!(field(5), Some(0), "{way:?}: {said}");
        assert_eq!((field(6), field(47)), (Some(65536), Some(65536)), "{way:?}: {said}");
    }
}

/// Lets another user read a directory of test files.
fn open_to_all(path: &Path) {
    let directory = std::fs::metadata(path).unwrap().is_dir();
    let mode = if directory { 0o777 } else { 0o666 };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    if directory {
        for entry in std::fs::read_dir(path).unwrap() {
            open_to_all(&entry.unwrap().path());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_manager_may_hand_over_the_socket() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("nbd.sock");
    let socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let here = std::env::current_exe().unwrap();
    let memory = here.ancestors().nth(2).unwrap().join("examples/memory");
    assert!(memory.exists(), "build the example first: cargo build -p tidemark-nbd --examples");
    let script = "exec 3<&0 </dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec \"$0\" --activated";
    let mut server = std::process::Command::new("sh")
        .args(["-c", script])
        .arg(&memory)
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(socket)))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let uri = format!("nbd+unix:///?socket={}", path.display());
    let size = run("nbdinfo", ["--size", &uri]).await;
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(server.id().try_into().unwrap()),
        nix::sys::signal::Signal::SIGTERM,
    )
    .unwrap();
    let status = server.wait().unwrap();
    assert_eq!(size.trim(), "67108864");
    assert!(status.success(), "{status}");
    assert!(path.exists(), "the socket is the service manager's to remove");
}
