//! A source and a target in one directory and one process.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tidemark_agent::Agent;
use tidemark_agent::config::{AgentConfig, GroupConfig, NodeConfig};
use tidemark_control::config::Source;
use tidemark_journal::GroupId;
use tidemark_link::pki::{Authority, NodeName};
use tidemark_nbd::client::{Client, Options};
use tidemark_target::{Config, Target};
use tokio::runtime::Runtime;

/// The group's name.
pub const GROUP: &str = "demo";
/// The volume's name.
pub const VOLUME: &str = "disk";

/// The running pair.
pub struct Site {
    /// Everything is in here.
    pub dir: PathBuf,
    /// The protected side.
    pub agent: Arc<Agent>,
    target: Option<Target>,
}

impl Site {
    /// Makes certificates and configuration in `dir`, where `disk.img` lies, and starts both sides.
    pub fn start(runtime: &Runtime, dir: &Path) -> Result<Site> {
        let authority = Authority::create("tidemark demo")?;
        let write = |name: &str, content: &[u8]| {
            let path = dir.join(name);
            std::fs::write(&path, content).with_context(|| format!("write {}", path.display()))
        };
        write("ca.pem", authority.pem().certificate_pem.as_ref())?;
        for node in ["source", "target"] {
            let issued = authority.issue(&node.parse::<NodeName>()?)?;
            write(&format!("{node}.pem"), issued.certificate_pem.as_ref())?;
            write(&format!("{node}.key"), issued.key_pem.as_ref())?;
        }
        let place = dir.display();
        let text = format!(
            "data_dir = \"{place}/target\"\n\n[link]\nlisten = \"127.0.0.1:0\"\nca = \"{place}/ca.pem\"\n\
             certificate = \"{place}/target.pem\"\nkey = \"{place}/target.key\"\n\n\
             [nbd]\nunix = \"{place}/points.sock\"\n\n[api]\nsocket = \"{place}/target.sock\"\n\n\
             [store]\nsegment = \"32 MiB\"\n\n\
             [[group]]\nname = \"{GROUP}\"\nnode = \"source\"\n"
        );
        let target = Target::start(&Config::parse(&text)?).context("start the target")?;
        let node = format!(
            "node = \"source\"\nstate_dir = \"{place}/state\"\nruntime_dir = \"{place}/run\"\n\
             api_socket = \"{place}/agent.sock\"\n\n[tls]\nca = \"{place}/ca.pem\"\n\
             certificate = \"{place}/source.pem\"\nkey = \"{place}/source.key\"\n"
        );
        let group = format!(
            "id = \"{}\"\nring_bytes = \"64 MiB\"\nfront = \"nbd-socket\"\n\n[target]\n\
             address = \"{}\"\nname = \"target\"\n\n[[volume]]\nid = 1\nname = \"{VOLUME}\"\n\
             backing = \"{place}/disk.img\"\nsocket = \"{place}/disk.sock\"\n",
            GroupId::random()?,
            target.link_addr(),
        );
        let node = NodeConfig::parse(&Source::new(&dir.join("agent.toml"), node))?;
        let group = GroupConfig::parse(&Source::new(&dir.join(format!("{GROUP}.toml")), group))?;
        let agent = runtime.block_on(async {
            let agent = Agent::new(&AgentConfig { node, groups: Vec::new() }.into(), None)?;
            agent.start_group(&group).await.context("protect the disk")?;
            anyhow::Ok(agent)
        })?;
        Ok(Site { dir: dir.to_owned(), agent, target: Some(target) })
    }

    /// The protected disk, as its application opens it.
    pub async fn open_disk(&self) -> Result<Client> {
        let socket = self.dir.join("disk.sock");
        Client::connect(socket.as_path(), VOLUME, &Options::default())
            .await
            .context("open the disk")
    }

    /// The disk as of a point.
    pub async fn open_point(&self, point: &str) -> Result<Client> {
        let (socket, name) = (self.dir.join("points.sock"), format!("{GROUP}/{VOLUME}@{point}"));
        let opened = Client::connect(socket.as_path(), &name, &Options::default()).await;
        opened.with_context(|| format!("open {name}"))
    }

    /// Ends both sides in order. The source waits so long for the target to have everything.
    pub fn stop(mut self, runtime: &Runtime, patience: Duration) {
        runtime.block_on(self.agent.stop_within(patience));
        if let Some(target) = self.target.take() {
            target.shutdown();
        }
    }
}

/// An image or a disk to copy.
pub struct Image {
    file: File,
    bytes: u64,
}

impl Image {
    /// Opens a file or block device that has content.
    pub fn open(path: &Path) -> Result<Image> {
        let shown = path.display();
        // Looked at before it is opened: opening a pipe waits for its other end.
        let metadata = std::fs::metadata(path).with_context(|| format!("open {shown}"))?;
        if !(metadata.is_file() || metadata.file_type().is_block_device()) {
            bail!("{shown} is neither a file nor a block device: give --disk an image or a disk");
        }
        let mut file = File::open(path).with_context(|| format!("open {shown}"))?;
        // A block device says its size only by seeking.
        let bytes = file.seek(SeekFrom::End(0)).with_context(|| format!("measure {shown}"))?;
        if bytes == 0 {
            bail!("{shown} is empty: give --disk an image or a disk that holds something");
        }
        Ok(Image { file, bytes })
    }
}

/// Makes an empty disk, or a sparse copy of an image, which is only read, with room behind it for
/// `more` bytes. Returns where that room begins. It fails soon once `ended` is set.
pub fn make_disk(path: &Path, image: Option<&Image>, more: u64, ended: &AtomicBool) -> Result<u64> {
    let disk = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .with_context(|| format!("make {}", path.display()))?;
    if let Some(image) = image {
        copy_sparse(image, &disk, ended).context("copy the image")?;
    }
    let offset = image.map_or(0, |image| image.bytes).next_multiple_of(1 << 20);
    disk.set_len(offset + more).with_context(|| format!("size {}", path.display()))?;
    Ok(offset)
}

/// Copies what an image holds and leaves its holes out.
fn copy_sparse(image: &Image, to: &File, ended: &AtomicBool) -> io::Result<()> {
    let Image { file: from, bytes: length } = image;
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while at < *length {
        let Some(data) = seek(from, at, libc::SEEK_DATA, *length)? else { break };
        let end = seek(from, data, libc::SEEK_HOLE, *length)?.unwrap_or(*length);
        at = data;
        while at < end {
            if ended.load(Ordering::Relaxed) {
                return Err(io::Error::other("it was interrupted"));
            }
            let piece = buffer.len().min(usize::try_from(end - at).unwrap_or(usize::MAX));
            from.read_exact_at(&mut buffer[..piece], at)?;
            to.write_all_at(&buffer[..piece], at)?;
            at += piece as u64;
        }
    }
    Ok(())
}

/// Where data or a hole begins at or after `at`; none if there is none. What knows no holes is all
/// data.
fn seek(file: &File, at: u64, whence: i32, length: u64) -> io::Result<Option<u64>> {
    let signed = libc::off_t::try_from(at).map_err(io::Error::other)?;
    // SAFETY: a plain system call on an open descriptor, without pointers.
    let found = unsafe { libc::lseek(file.as_raw_fd(), signed, whence) };
    if found >= 0 {
        return Ok(Some(found as u64));
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::ENXIO) => Ok(None),
        Some(libc::EINVAL) => Ok(Some(if whence == libc::SEEK_DATA { at } else { length })),
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_has_the_content_and_the_holes() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        let file = File::create_new(&image).unwrap();
        file.set_len((64 << 20) + 512).unwrap();
        file.write_all_at(b"in the middle", 20 << 20).unwrap();
        file.write_all_at(b"end", (64 << 20) + 509).unwrap();
        let disk = dir.path().join("disk");
        let opened = Image::open(&image).unwrap();
        let made = make_disk(&disk, Some(&opened), 4096, &AtomicBool::new(false));
        assert_eq!(made.unwrap(), 65 << 20);
        let copy = std::fs::read(&disk).unwrap();
        assert_eq!(copy.len(), (65 << 20) + 4096);
        assert!(copy[..(64 << 20) + 512] == std::fs::read(&image).unwrap());
        use std::os::unix::fs::MetadataExt;
        assert!(disk.metadata().unwrap().blocks() * 512 < 8 << 20, "the copy has no holes");
    }

    #[test]
    fn an_interrupted_copy_ends() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        std::fs::write(&image, "content").unwrap();
        let opened = Image::open(&image).unwrap();
        let disk = dir.path().join("disk");
        let error = make_disk(&disk, Some(&opened), 4096, &AtomicBool::new(true)).unwrap_err();
        assert!(format!("{error:#}").contains("interrupted"), "{error:#}");
    }

    #[test]
    fn only_what_can_be_copied_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let empty = dir.path().join("empty");
        File::create_new(&empty).unwrap();
        let refused = |path: &Path| Image::open(path).err().unwrap().to_string();
        assert!(refused(dir.path()).contains("neither a file nor a block device"));
        assert!(refused("/dev/null".as_ref()).contains("neither a file nor a block device"));
        assert!(refused(&empty).contains("is empty"));
    }
}
