//! The disk: files by number, directories by path, what happens to them, and what goes wrong.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use crate::{
    SECTOR_BYTES,
    content::{BLOCK_BYTES, Content, Sector},
    fault::{Faults, Op, Planned, errno, error},
    file::{How, SimFile},
    names::{Change, Node, Tree},
    rng::{Rng, mix},
};

/// A simulated disk. Clones are the same disk.
#[derive(Clone)]
pub struct SimDisk(Arc<Mutex<State>>);

/// What a directory lists.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Whether it is a directory.
    pub is_dir: bool,
    /// Bytes of a file.
    pub bytes: u64,
}

/// All that is on a disk at a moment, for [`SimDisk::restore`].
#[derive(Clone)]
pub struct Image {
    tree: Tree,
    files: BTreeMap<u64, Content>,
}

struct State {
    tree: Tree,
    files: BTreeMap<u64, Content>,
    /// Those that were opened in this life, and whether they still are.
    open: BTreeMap<u64, Weak<()>>,
    next_file: u64,
    life: u64,
    rng: Rng,
    faults: Faults,
    faults_on: String,
    watcher: Option<Box<dyn FnMut(Image) + Send>>,
    planned: Vec<Planned>,
    capacity_bytes: Option<u64>,
    effects: u64,
    /// After this effect the power is off.
    cut_after: Option<u64>,
    off: bool,
    /// Nothing stands between it and its users.
    direct: bool,
    fingerprint: u64,
}

impl SimDisk {
    /// An empty disk without bounds and faults. Everything by chance follows from the seed.
    pub fn new(seed: u64) -> SimDisk {
        let mut tree = Tree::new();
        tree.insert(PathBuf::from("/"), Default::default());
        SimDisk(Arc::new(Mutex::new(State {
            tree,
            files: BTreeMap::new(),
            open: BTreeMap::new(),
            next_file: 0,
            life: 0,
            rng: Rng::new(seed),
            faults: Faults::default(),
            faults_on: String::new(),
            watcher: None,
            planned: Vec::new(),
            capacity_bytes: None,
            effects: 0,
            cut_after: None,
            off: false,
            direct: false,
            fingerprint: seed,
        })))
    }

    /// An empty disk that is read and written without the memory of an operating system between: what it has
    /// lost in a sync that failed is seen to be gone.
    pub fn new_direct(seed: u64) -> SimDisk {
        let disk = SimDisk::new(seed);
        disk.state().direct = true;
        disk
    }

    // What a file system does.

    /// Opens a file, whose path is absolute.
    ///
    /// # Errors
    /// `ENOENT` (it, or its directory), `EEXIST`, `EIO`.
    pub fn open(&self, path: &Path, how: How) -> io::Result<SimFile> {
        let mut state = self.state();
        let there = match state.node(path)? {
            Some(Node::File(number)) => Some(number),
            Some(Node::Dir) => return Err(error(errno::EEXIST)),
            None => None,
        };
        let number = match (there, how) {
            (Some(_), How::New) => return Err(error(errno::EEXIST)),
            (None, How::Read | How::Write) => return Err(error(errno::ENOENT)),
            (Some(number), _) => {
                state.begin(Op::Open, path, 0)?;
                if how == How::Truncate {
                    state.begin(Op::Resize, path, 0)?;
                    state.file(number)?.set_length(0);
                }
                number
            }
            (None, _) => {
                state.begin(Op::Create, path, 0)?;
                let number = state.next_file;
                state.next_file += 1;
                state.files.insert(number, Content::default());
                state.rename_in(path, |name| Change::Put(name, Node::File(number)))?;
                number
            }
        };
        let open = state.open.entry(number).or_default();
        let handle = open.upgrade().unwrap_or_default();
        *open = Arc::downgrade(&handle);
        let (disk, path) = (self.clone(), path.to_owned());
        let (life, writable) = (state.life, how != How::Read);
        Ok(SimFile { disk, path, number, life, writable, _open: handle })
    }

    /// Makes a directory, and those above it that are not there.
    ///
    /// # Errors
    /// `EEXIST` when a file is in the way, `EIO`.
    pub fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        let mut above: Vec<&Path> = path.ancestors().collect();
        above.reverse();
        for dir in above {
            if state.tree.contains_key(dir) {
                continue;
            }
            if state.node(dir)?.is_some() {
                return Err(error(errno::EEXIST));
            }
            state.begin(Op::Create, dir, 0)?;
            state.rename_in(dir, |name| Change::Put(name, Node::Dir))?;
            state.tree.insert(dir.to_owned(), Default::default());
        }
        Ok(())
    }

    /// Whether there is a file or directory of this path.
    pub fn exists(&self, path: &Path) -> bool {
        let state = self.state();
        !state.off && (state.tree.contains_key(path) || matches!(state.node(path), Ok(Some(_))))
    }

    /// What is in a directory, sorted by name.
    ///
    /// # Errors
    /// `ENOENT`, `EIO`.
    pub fn list(&self, dir: &Path) -> io::Result<Vec<Entry>> {
        let state = self.state();
        state.power()?;
        let names = &state.tree.get(dir).ok_or_else(|| error(errno::ENOENT))?.now;
        let entry = |(name, node): (&String, &Node)| {
            let bytes = match node {
                Node::File(number) => state.files.get(number).map_or(0, |file| file.now.length),
                Node::Dir => 0,
            };
            Entry { name: name.clone(), is_dir: *node == Node::Dir, bytes }
        };
        Ok(names.iter().map(entry).collect())
    }

    /// Renames a file inside its directory, over another of that name if there is one.
    ///
    /// # Errors
    /// `ENOENT`, `EIO`.
    ///
    /// # Panics
    /// When the directories differ, which this disk does not know.
    pub fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        assert_eq!(from.parent(), to.parent(), "a rename inside one directory");
        let mut state = self.state();
        let node = state.node(from)?.ok_or_else(|| error(errno::ENOENT))?;
        assert!(matches!(node, Node::File(_)), "a rename of a file");
        state.begin(Op::Rename, from, 0)?;
        let name = name_of(from)?;
        state.rename_in(to, |to| Change::Rename(name, to, node))
    }

    /// Removes a file. Who has it open can go on with it.
    ///
    /// # Errors
    /// `ENOENT`, `EIO`.
    pub fn remove_file(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        match state.node(path)? {
            Some(Node::File(_)) => {
                state.begin(Op::Remove, path, 0)?;
                state.rename_in(path, Change::Remove)
            }
            _ => Err(error(errno::ENOENT)),
        }
    }

    /// Removes a directory and all that is in it, name by name.
    ///
    /// # Errors
    /// `ENOENT`, `EIO`; some of it may be gone then.
    pub fn remove_dir_all(&self, dir: &Path) -> io::Result<()> {
        for entry in self.list(dir)? {
            let path = dir.join(&entry.name);
            if entry.is_dir { self.remove_dir_all(&path)? } else { self.remove_file(&path)? }
        }
        let mut state = self.state();
        state.begin(Op::Remove, dir, 0)?;
        state.tree.remove(dir);
        state.rename_in(dir, Change::Remove)
    }

    /// Makes the names in a directory durable.
    ///
    /// # Errors
    /// `ENOENT`; `EIO`, and the names are as little durable as before.
    pub fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut state = self.state();
        if !state.tree.contains_key(dir) {
            state.power()?;
            return Err(error(errno::ENOENT));
        }
        state.begin(Op::SyncDir, dir, 0)?;
        if state.chance(dir, |faults| faults.sync_fails) {
            return Err(error(errno::EIO));
        }
        let names = state.tree.get_mut(dir).ok_or_else(|| error(errno::ENOENT))?;
        names.synced();
        Ok(())
    }

    /// Bytes of the disk that are taken.
    pub fn used_bytes(&self) -> u64 {
        self.state().used_blocks() * BLOCK_BYTES
    }

    /// Bytes of the disk that the files in a directory take, without those below.
    pub fn used_bytes_in(&self, dir: &Path) -> u64 {
        let state = self.state();
        let nodes = state.tree.get(dir).into_iter().flat_map(|dir| dir.now.values());
        let blocks = nodes.map(|node| match node {
            Node::File(number) => state.files.get(number).map_or(0, |file| file.now.blocks.len()),
            Node::Dir => 0,
        });
        blocks.sum::<usize>() as u64 * BLOCK_BYTES
    }

    // What happens to it.

    /// The power is cut and comes back: what was not durable is kept or lost, by the seed. Handles
    /// are worth nothing any more; a [`cut_after`](Self::cut_after) is over.
    pub fn crash(&self) {
        let mut state = self.state();
        let State { tree, files, rng, .. } = &mut *state;
        for dir in tree.values_mut() {
            dir.lose(rng);
            dir.restarted();
        }
        for file in files.values_mut() {
            file.lose(rng);
            file.restarted();
        }
        state.next_life();
    }

    /// The process dies and the machine goes on: handles are worth nothing any more, and nothing is
    /// lost.
    pub fn kill(&self) {
        self.state().next_life();
    }

    /// Lets so many more effects happen, then cuts the power: everything fails with `EIO` until
    /// [`crash`](Self::crash).
    pub fn cut_after(&self, effects: u64) {
        let mut state = self.state();
        state.cut_after = Some(state.effects + effects);
    }

    /// Takes [`Self::cut_after`] back.
    pub fn stay_on(&self) {
        self.state().cut_after = None;
    }

    /// Whether the power is off.
    pub fn is_off(&self) -> bool {
        self.state().off
    }

    /// Effects so far: writes, syncs, changes of length and of names, failed ones included.
    pub fn effects(&self) -> u64 {
        self.state().effects
    }

    /// The most that fits on the disk; `None` is no bound. What is there stays.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.state().capacity_bytes = bytes;
    }

    /// What goes wrong by chance from now on.
    pub fn set_faults(&self, faults: Faults) {
        self.set_faults_on("", faults);
    }

    /// The same for files whose paths contain `part` alone.
    pub fn set_faults_on(&self, part: &str, faults: Faults) {
        let mut state = self.state();
        state.faults = faults;
        part.clone_into(&mut state.faults_on);
    }

    /// Hands an image of the disk to `each` before every effect: what there is when the power goes
    /// at that moment. `None` ends that. `each` must not use the disk.
    pub fn watch(&self, each: Option<Box<dyn FnMut(Image) + Send>>) {
        self.state().watcher = each;
    }

    /// Makes one operation fail: the one after `passes` others of its kind on paths that contain
    /// `part`. An `EIO` of a sync loses data as [`Faults::sync_fails`] does.
    pub fn fail(&self, op: Op, part: &str, passes: u32, errno: i32) {
        self.state().planned.push(Planned { op, part: part.to_owned(), passes, errno });
    }

    /// Forgets what [`fail`](Self::fail) planned and has not come yet.
    pub fn fail_no_more(&self) {
        self.state().planned.clear();
    }

    /// Flips a bit of a file, on the disk and in memory.
    ///
    /// # Errors
    /// `ENOENT`.
    ///
    /// # Panics
    /// When the bit is beyond the file's end.
    pub fn rot(&self, path: &Path, bit: u64) -> io::Result<()> {
        let mut state = self.state();
        let Some(Node::File(number)) = state.node(path)? else { return Err(error(errno::ENOENT)) };
        let file = state.file(number)?;
        assert!(bit / 8 < file.now.length, "a bit inside the file");
        file.flip(bit);
        state.note(&[0xb17, bit]);
        Ok(())
    }

    /// All that is on the disk, the changes that are not durable yet included.
    pub fn image(&self) -> Image {
        let state = self.state();
        Image { tree: state.tree.clone(), files: state.files.clone() }
    }

    /// Puts an image back, as from a backup, while nobody uses the disk: handles are worth nothing
    /// any more.
    pub fn restore(&self, image: &Image) {
        let mut state = self.state();
        state.tree.clone_from(&image.tree);
        state.files.clone_from(&image.files);
        // The image may be another disk's.
        let next = image.files.last_key_value().map_or(0, |(number, _)| number + 1);
        state.next_file = state.next_file.max(next);
        state.next_life();
    }

    /// A hash of all calls so far and of what came of them.
    pub fn fingerprint(&self) -> u64 {
        self.state().fingerprint
    }

    // What open files do.

    pub(crate) fn read(&self, file: &SimFile, out: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut state = self.state();
        state.alive(file)?;
        state.begin(Op::Read, &file.path, offset)?;
        if state.chance(&file.path, |faults| faults.read_fails) {
            return Err(error(errno::EIO));
        }
        let read = state.file(file.number)?.read(offset, out);
        state.note(&[0x4ead, read as u64, sum(&out[..read])]);
        Ok(read)
    }

    pub(crate) fn write(&self, file: &SimFile, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut state = self.state();
        state.alive_to_write(file)?;
        if bytes.is_empty() {
            return Ok(());
        }
        let begun = state.begin(Op::Write, &file.path, offset);
        if state.off {
            return begun;
        }
        state.note(&[bytes.len() as u64, sum(bytes)]);
        let failed = match begun {
            Err(error) => Some(error),
            Ok(()) => {
                state.chance(&file.path, |faults| faults.write_fails).then(|| error(errno::EIO))
            }
        };
        let end = offset + bytes.len() as u64;
        // What there is room for is written.
        let mut room = state.free_blocks();
        let content = state.file(file.number)?;
        if end > content.now.length && failed.is_none() {
            content.set_length(end);
        }
        let mut at = offset;
        while at < end {
            let number = at / SECTOR_BYTES;
            let inside = (at % SECTOR_BYTES) as usize;
            let step = (SECTOR_BYTES - inside as u64).min(end - at) as usize;
            let from = (at - offset) as usize;
            let block = at / BLOCK_BYTES;
            let content = state.file(file.number)?;
            if content.missing_blocks(block, block + 1) > 0 {
                if room == 0 {
                    return Err(error(errno::ENOSPC));
                }
                room -= 1;
                content.set_aside(block, block + 1);
            }
            let mut sector: Sector = content.now.sector(number);
            sector[inside..inside + step].copy_from_slice(&bytes[from..from + step]);
            let length = content.now.length;
            if failed.is_none() || (at < length && state.rng.chance(500_000)) {
                state.put(file, number, sector)?;
            }
            at += step as u64;
        }
        failed.map_or(Ok(()), Err)
    }

    pub(crate) fn sync(&self, file: &SimFile) -> io::Result<()> {
        let mut state = self.state();
        state.alive(file)?;
        let begun = state.begin(Op::Sync, &file.path, 0);
        if state.off {
            return begun;
        }
        let by_chance = state.chance(&file.path, |faults| faults.sync_fails);
        let State { files, rng, direct, .. } = &mut *state;
        let content = files.get_mut(&file.number).ok_or_else(|| error(errno::EIO))?;
        if by_chance || begun.is_err() {
            content.sync_failed(rng);
            if *direct {
                content.restarted();
            }
            return begun.and(Err(error(errno::EIO)));
        }
        content.synced();
        Ok(())
    }

    pub(crate) fn length(&self, file: &SimFile) -> io::Result<u64> {
        let mut state = self.state();
        state.alive(file)?;
        Ok(state.file(file.number)?.now.length)
    }

    pub(crate) fn set_length(&self, file: &SimFile, bytes: u64) -> io::Result<()> {
        let mut state = self.state();
        state.alive_to_write(file)?;
        state.begin(Op::Resize, &file.path, bytes)?;
        state.file(file.number)?.set_length(bytes);
        Ok(())
    }

    pub(crate) fn preallocate(&self, file: &SimFile, offset: u64, bytes: u64) -> io::Result<()> {
        let mut state = self.state();
        state.alive_to_write(file)?;
        state.begin(Op::Preallocate, &file.path, offset + bytes)?;
        let (from, to) = (offset / BLOCK_BYTES, (offset + bytes).div_ceil(BLOCK_BYTES));
        let free = state.free_blocks();
        let content = state.file(file.number)?;
        if content.missing_blocks(from, to) > free {
            return Err(error(errno::ENOSPC));
        }
        content.set_length((offset + bytes).max(content.now.length));
        content.set_aside(from, to);
        Ok(())
    }

    pub(crate) fn punch(&self, file: &SimFile, offset: u64, bytes: u64) -> io::Result<()> {
        let mut state = self.state();
        state.alive_to_write(file)?;
        state.begin(Op::Resize, &file.path, offset)?;
        let content = state.file(file.number)?;
        let end = (offset + bytes).min(content.now.length);
        let (first, last) = (offset.div_ceil(SECTOR_BYTES), end / SECTOR_BYTES);
        // Parts of sectors are zeroed like any write.
        let head = (offset, end.min(first * SECTOR_BYTES));
        let tail = (head.1.max(last * SECTOR_BYTES), end);
        for (from, to) in [head, tail] {
            if from < to {
                let number = from / SECTOR_BYTES;
                let mut sector = content.now.sector(number);
                let inside = (from % SECTOR_BYTES) as usize;
                sector[inside..inside + (to - from) as usize].fill(0);
                content.put(number, sector);
            }
        }
        if first < last {
            content.punch(first, last);
        }
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn power(&self) -> io::Result<()> {
        if self.off { Err(error(errno::EIO)) } else { Ok(()) }
    }

    /// Notes an operation, counts it if it is an effect, and has it fail where that was planned.
    fn begin(&mut self, op: Op, path: &Path, number: u64) -> io::Result<()> {
        self.power()?;
        let text = path.to_str().unwrap_or_default();
        if !matches!(op, Op::Read | Op::Open) {
            if self.cut_after.is_some_and(|last| self.effects >= last) {
                self.off = true;
                return Err(error(errno::EIO));
            }
            // As the effects before have left it.
            if let Some(mut each) = self.watcher.take() {
                each(Image { tree: self.tree.clone(), files: self.files.clone() });
                self.watcher = Some(each);
            }
            self.effects += 1;
        }
        self.note(&[op as u64, sum(text.as_bytes()), number]);
        let met = self.planned.iter_mut().position(|planned| planned.meets(op, text));
        match met {
            Some(place) => Err(error(self.planned.remove(place).errno)),
            None => Ok(()),
        }
    }

    fn chance(&mut self, path: &Path, of: impl Fn(&Faults) -> u32) -> bool {
        let per_million = of(&self.faults);
        let concerned = || path.to_str().is_some_and(|path| path.contains(&self.faults_on));
        let per_million = if per_million > 0 && concerned() { per_million } else { 0 };
        self.rng.chance(per_million)
    }

    /// Writes a sector, unless it is lost or lands elsewhere.
    fn put(&mut self, file: &SimFile, number: u64, sector: Sector) -> io::Result<()> {
        if self.chance(&file.path, |faults| faults.write_is_lost) {
            return Ok(());
        }
        let elsewhere = self.chance(&file.path, |faults| faults.write_lands_elsewhere);
        let length = self.file(file.number)?.now.length;
        let number = if elsewhere { self.rng.below(length.div_ceil(SECTOR_BYTES)) } else { number };
        self.file(file.number)?.put(number, sector);
        Ok(())
    }

    fn node(&self, path: &Path) -> io::Result<Option<Node>> {
        self.power()?;
        let parent = path.parent().ok_or_else(|| error(errno::ENOENT))?;
        let dir = self.tree.get(parent).ok_or_else(|| error(errno::ENOENT))?;
        Ok(dir.now.get(&name_of(path)?).copied())
    }

    /// Changes the directory that a path is in.
    fn rename_in(&mut self, path: &Path, change: impl FnOnce(String) -> Change) -> io::Result<()> {
        let parent = path.parent().ok_or_else(|| error(errno::ENOENT))?;
        let name = name_of(path)?;
        let dir = self.tree.get_mut(parent).ok_or_else(|| error(errno::ENOENT))?;
        dir.change(change(name));
        Ok(())
    }

    fn file(&mut self, number: u64) -> io::Result<&mut Content> {
        self.files.get_mut(&number).ok_or_else(|| error(errno::EIO))
    }

    fn alive(&self, file: &SimFile) -> io::Result<()> {
        self.power()?;
        if file.life == self.life { Ok(()) } else { Err(error(errno::EIO)) }
    }

    fn alive_to_write(&self, file: &SimFile) -> io::Result<()> {
        self.alive(file)?;
        assert!(file.writable, "{} is open for reading only", file.path.display());
        Ok(())
    }

    /// A file takes room until it is neither open nor may have a name after a power cut.
    fn used_blocks(&self) -> u64 {
        let named = self.tree.values().flat_map(|dir| dir.names());
        let open = self.open.iter().filter(|(_, open)| open.strong_count() > 0);
        let used: BTreeSet<u64> = named.chain(open.map(|(number, _)| *number)).collect();
        let files = used.iter().filter_map(|number| self.files.get(number));
        files.map(|file| file.now.blocks.len() as u64).sum()
    }

    fn free_blocks(&self) -> u64 {
        let all = self.capacity_bytes.map_or(u64::MAX, |bytes| bytes / BLOCK_BYTES);
        if all == u64::MAX { all } else { all.saturating_sub(self.used_blocks()) }
    }

    fn next_life(&mut self) {
        self.life += 1;
        self.off = false;
        self.cut_after = None;
        // A directory whose name was lost is gone with all that was in it; so are files that no
        // name stands for.
        let reachable = |tree: &Tree, dir: &Path| {
            dir.ancestors().zip(dir.ancestors().skip(1)).all(|(dir, parent)| {
                let name = dir.file_name().and_then(|name| name.to_str());
                let node = name.and_then(|name| tree.get(parent)?.now.get(name));
                node == Some(&Node::Dir)
            })
        };
        let dirs: Vec<PathBuf> = self.tree.keys().cloned().collect();
        for dir in &dirs {
            if !reachable(&self.tree, dir) {
                self.tree.remove(dir);
            }
        }
        // A directory whose removal was lost is there again, empty.
        let named: Vec<PathBuf> = self
            .tree
            .iter()
            .flat_map(|(path, dir)| {
                let dirs = dir.now.iter().filter(|(_, node)| **node == Node::Dir);
                dirs.map(|(name, _)| path.join(name)).collect::<Vec<_>>()
            })
            .collect();
        for dir in named {
            self.tree.entry(dir).or_default();
        }
        self.open.clear();
        let used: BTreeSet<u64> = self.tree.values().flat_map(|dir| dir.names()).collect();
        self.files.retain(|number, _| used.contains(number));
        let life = self.life;
        self.note(&[0x11fe, life]);
    }

    fn note(&mut self, numbers: &[u64]) {
        for number in numbers {
            self.fingerprint = mix(self.fingerprint.rotate_left(7) ^ number);
        }
    }
}

fn name_of(path: &Path) -> io::Result<String> {
    let name = path.file_name().and_then(|name| name.to_str());
    name.map(str::to_owned).ok_or_else(|| error(errno::ENOENT))
}

/// FNV-1a, eight bytes at a time.
fn sum(bytes: &[u8]) -> u64 {
    let step = |hash: u64, part: u64| (hash ^ part).wrapping_mul(0x0100_0000_01b3);
    let mut parts = bytes.chunks_exact(8);
    let mut hash = 0xcbf2_9ce4_8422_2325;
    for part in &mut parts {
        hash = step(hash, u64::from_le_bytes(part.try_into().unwrap_or_default())).rotate_left(5);
    }
    parts.remainder().iter().fold(hash, |hash, byte| step(hash, u64::from(*byte)))
}

impl SimDisk {
    /// What a file holds now, for who checks: no fault is met, and nothing is noted.
    ///
    /// # Errors
    /// `ENOENT`.
    pub fn peek(&self, path: &str, out: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut state = self.state();
        let off = std::mem::replace(&mut state.off, false);
        let node = state.node(Path::new(path));
        state.off = off;
        let Some(Node::File(number)) = node? else { return Err(error(errno::ENOENT)) };
        Ok(state.file(number)?.read(offset, out))
    }
}
