//! All branches of a target, by group and name.

use std::{
    collections::BTreeMap,
    str::FromStr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, anyhow};
use tidemark_control::config::Name;
use tidemark_journal::Term;
use tokio::runtime::Handle;

use super::{Branch, ClientGuard, branch_dir};
use crate::{
    catalogue::BranchRow,
    groups::Groups,
    pins::PinGuard,
    points::{
        Refusal, Spec,
        resolve::{Scope, resolve},
    },
    receiver::driver::blocking,
    replica::Replica,
};

/// The branches.
pub struct Branches {
    groups: Arc<Groups>,
    runtime: Handle,
    table: Mutex<BTreeMap<Key, Entry>>,
    /// Groups whose branches could not be read, by name. Nobody knows which points they need, so
    /// nothing of these groups leaves until the next start.
    unread: BTreeMap<String, Unread>,
    ended: AtomicBool,
}

/// The group's name and the branch's.
type Key = (String, String);

/// What there is of a branch.
enum Entry {
    Open(Arc<Branch>),
    Broken(Broken),
    /// Somebody works on it: what is done to it, as a word.
    Busy(&'static str),
}

struct Unread {
    /// Why, as a sentence.
    why: String,
    _pin: PinGuard,
}

/// A branch that the catalogue knows and that cannot be opened: to be shown, and dropped. Its point
/// stays until then.
#[derive(Clone)]
pub struct Broken {
    /// Its name.
    pub name: String,
    /// The replica it is a child of.
    pub parent: Arc<Replica>,
    /// What the catalogue has of it.
    pub row: BranchRow,
    /// Why, as a sentence.
    pub why: String,
    /// What holds its point; none when that had left before.
    _pin: Option<Arc<PinGuard>>,
}

/// What a branch is made of.
#[derive(Clone, Debug)]
pub struct NewBranch {
    /// Its name; none means that one is made up.
    pub name: Option<String>,
    /// The group.
    pub group: String,
    /// One volume only; none means all of the group.
    pub volume: Option<String>,
    /// The point.
    pub spec: Spec,
    /// Whether it is dropped when nobody has had it open for a while.
    pub temporary: bool,
}

/// Why a branch cannot be made or dropped.
#[derive(Debug, thiserror::Error)]
pub enum BranchError {
    /// The request does not fit what is there.
    #[error("{0}")]
    Refused(String),
    /// There is no such thing.
    #[error("{0}")]
    NotFound(String),
    /// It is in use, or the name is.
    #[error("{0}")]
    Conflict(String),
    /// The target failed.
    #[error("{0:#}")]
    Failed(#[from] anyhow::Error),
}

impl Broken {
    /// What is left of a branch that is being dropped.
    fn dropped(branch: &Branch) -> Broken {
        Broken {
            name: branch.name().to_owned(),
            parent: Arc::clone(branch.parent()),
            row: branch.row().clone(),
            why: "it is being dropped".to_owned(),
            _pin: Some(Arc::clone(branch.pin())),
        }
    }
}

impl From<Refusal> for BranchError {
    fn from(refusal: Refusal) -> BranchError {
        BranchError::Refused(refusal.0)
    }
}

impl Branches {
    /// The branches that the catalogue knows. One that cannot be opened does not keep the others
    /// from it. Their points are held from here on: until then nothing may be folded.
    pub fn open(groups: &Arc<Groups>, runtime: Handle) -> Arc<Branches> {
        let mut branches = Branches {
            groups: Arc::clone(groups),
            runtime,
            table: Mutex::default(),
            unread: BTreeMap::new(),
            ended: AtomicBool::new(false),
        };
        for replica in groups.replicas() {
            let rows = match groups.catalogue().branches(replica.name()) {
                Ok(rows) => rows,
                Err(error) => {
                    let why = format!(
                        "the branches of '{}' cannot be read, so none of its history leaves and \
                         none can be made or dropped: put right what is wrong there and restart \
                         the target ({error:#})",
                        replica.name()
                    );
                    replica.notice(why.clone());
                    let pin = replica.pin_oldest("branches that cannot be read");
                    let unread = Unread { why, _pin: pin };
                    branches.unread.insert(replica.name().to_owned(), unread);
                    continue;
                }
            };
            if let Err(error) = branches.remove_remains(&replica, &rows) {
                tracing::warn!(group = replica.name(), "what dropped branches left: {error:#}");
            }
            for (name, row) in rows {
                let entry = branches.opened(&name, row, &replica);
                branches.table().insert(key(replica.name(), &name), entry);
            }
        }
        Arc::new(branches)
    }

    /// Makes a branch. Blocks on the disk.
    ///
    /// # Errors
    /// [`BranchError`].
    pub fn create(&self, new: &NewBranch) -> Result<Arc<Branch>, BranchError> {
        let group = new.group.as_str();
        let replica = self
            .groups
            .replica(group)
            .ok_or_else(|| BranchError::NotFound(self.groups.absence(group)))?;
        if let Some(Unread { why, .. }) = self.unread.get(group) {
            return Err(BranchError::Failed(anyhow!("{why}")));
        }
        let name = self.take_name(group, new.name.as_deref())?;
        let key = key(group, &name);
        // Whoever looks at other branches meanwhile does not wait for the disk.
        let (entry, made) = self.made(new, &name, &replica);
        match entry {
            Some(entry) => self.table().insert(key, entry),
            None => self.table().remove(&key),
        };
        if let Ok(branch) = &made
            && self.ended.load(Ordering::Acquire)
        {
            branch.end();
        }
        made
    }

    /// Keeps a name for a branch that is to be made: this one, or one that is made up.
    fn take_name(&self, group: &str, name: Option<&str>) -> Result<String, BranchError> {
        let mut table = self.table();
        let name = name.map_or_else(|| made_up(group, &table), str::to_owned);
        Name::from_str(&name).map_err(|error| BranchError::Refused(error.to_string()))?;
        let key = key(group, &name);
        match table.get(&key) {
            Some(Entry::Busy(what)) => return Err(busy(&name, what)),
            Some(_) => {
                let text = format!("there is a branch '{name}' already");
                return Err(BranchError::Conflict(text));
            }
            None => _ = table.insert(key, Entry::Busy("made")),
        }
        Ok(name)
    }

    /// Makes a branch whose name is kept for it; and what there is of it then, also when that fails.
    fn made(
        &self,
        new: &NewBranch,
        name: &str,
        replica: &Arc<Replica>,
    ) -> (Option<Entry>, Result<Arc<Branch>, BranchError>) {
        let (row, pin) = match self.new_row(new, name, replica) {
            Ok(row) => row,
            Err(error) => return (None, Err(error)),
        };
        let catalogue = self.groups.catalogue();
        let begun = catalogue.begin_branch(replica.name(), name, &row);
        let error = match begun.and_then(|()| self.run(name, &row, replica, &pin)) {
            Ok(branch) => return (Some(Entry::Open(Arc::clone(&branch))), Ok(branch)),
            Err(error) => error,
        };
        // Its row may be there, also when it could not be put for certain.
        let left = catalogue.drop_branch(replica.name(), name).err().map(|left| {
            let why = format!(
                "the branch '{name}' could not be made ({error:#}), and the catalogue cannot \
                 forget it again ({left:#}): drop it"
            );
            let (name, parent) = (name.to_owned(), Arc::clone(replica));
            Entry::Broken(Broken { name, parent, row, why, _pin: Some(pin) })
        });
        (left, Err(error.into()))
    }

    /// What the catalogue is to have of a new branch, whose point is held and whose directory is empty.
    fn new_row(
        &self,
        new: &NewBranch,
        name: &str,
        replica: &Arc<Replica>,
    ) -> Result<(BranchRow, Arc<PinGuard>), BranchError> {
        let seq = resolve(replica, new.volume.as_deref(), &new.spec)?.seq;
        let pin = replica.pin(seq, holder(name)).map_err(|oldest| {
            let text = format!("@seq:{seq} has just left the window; the oldest is @seq:{oldest}");
            BranchError::Refused(text)
        })?;
        let parent = replica.ledger().history(|history| history.position(seq));
        let machine = self.groups.machine();
        let row = BranchRow {
            term: Term {
                id: machine.new_term().map_err(anyhow::Error::from)?,
                parent: parent.term,
                fork_seq: seq,
            },
            volume: new.volume.clone(),
            point: new.spec.to_string(),
            temporary: new.temporary,
            damage: None,
            created_ns: machine.wall_ns(),
        };
        // What an earlier branch of this name has left would be taken for the new one's.
        let dir = branch_dir(replica, name);
        let emptied = machine.remove_dir_all(&dir).and_then(|()| machine.create_dir_all(&dir));
        emptied.with_context(|| format!("cannot make {} anew", dir.display()))?;
        Ok((row, Arc::new(pin)))
    }

    /// Drops a branch and what was written into it, once nothing works on that any more. Goes on
    /// when it is not waited for.
    ///
    /// # Errors
    /// [`BranchError`].
    pub async fn drop_branch(self: &Arc<Self>, group: &str, name: &str) -> Result<(), BranchError> {
        let key = key(group, name);
        let (open, left) = {
            let mut table = self.table();
            let found = match table.get(&key) {
                None => return Err(self.absent(group, name)),
                Some(Entry::Busy(what)) => return Err(busy(name, what)),
                Some(Entry::Open(branch)) if branch.clients() > 0 => {
                    return Err(BranchError::Conflict(format!(
                        "the branch '{name}' is open ({} clients): disconnect them first",
                        branch.clients()
                    )));
                }
                Some(Entry::Open(branch)) => (Some(Arc::clone(branch)), Broken::dropped(branch)),
                Some(Entry::Broken(broken)) => (None, broken.clone()),
            };
            table.insert(key.clone(), Entry::Busy("dropped"));
            found
        };
        let own = Arc::clone(self);
        let dropped = self.runtime.spawn(async move { own.removed(key, open, left).await });
        Ok(dropped.await.map_err(anyhow::Error::from).flatten()?)
    }

    /// A branch that can be used.
    pub fn get(&self, group: &str, name: &str) -> Option<Arc<Branch>> {
        match self.table().get(&key(group, name)) {
            Some(Entry::Open(branch)) => Some(Arc::clone(branch)),
            _ => None,
        }
    }

    /// The same for a client, which keeps it from being dropped.
    pub fn enter(&self, group: &str, name: &str) -> Option<(Arc<Branch>, ClientGuard)> {
        match self.table().get(&key(group, name)) {
            // Under the lock, which whoever drops it takes to look for clients.
            Some(Entry::Open(branch)) => Some((Arc::clone(branch), branch.opened())),
            _ => None,
        }
    }

    /// Why a branch that may be there cannot be used, as a sentence; none when there is no such
    /// branch.
    pub fn why_not(&self, group: &str, name: &str) -> Option<String> {
        match self.table().get(&key(group, name)) {
            Some(Entry::Broken(broken)) => Some(broken.why.clone()),
            Some(Entry::Open(_)) => None,
            Some(Entry::Busy(what)) => Some(busy(name, what).to_string()),
            None => self.unread.get(group).map(|unread| unread.why.clone()),
        }
    }

    /// Those that cannot be opened.
    pub fn broken(&self) -> Vec<Broken> {
        let table = self.table();
        let broken = table.values().filter_map(|entry| match entry {
            Entry::Broken(broken) => Some(broken.clone()),
            _ => None,
        });
        broken.collect()
    }

    /// Why the branches of some groups are neither among these nor those that can be used, a sentence each.
    pub fn unread(&self) -> Vec<String> {
        self.unread.values().map(|unread| unread.why.clone()).collect()
    }

    /// Once in a while: keeps in the catalogue how far the branches are durable, and begins to drop
    /// temporary ones that nobody has had open for as long as `linger`. Blocks on the disk.
    pub fn look_after(self: &Arc<Self>, linger: Duration) {
        for branch in self.list() {
            if branch.row().temporary && branch.idle() >= linger {
                let own = Arc::clone(self);
                self.runtime.spawn(async move {
                    let name = branch.name();
                    tracing::info!(branch = name, "temporary, and nobody has it open: dropped");
                    if let Err(error) = own.drop_branch(branch.parent().name(), name).await {
                        tracing::warn!(branch = name, "cannot drop it: {error}");
                    }
                });
            } else if let Err(error) = branch.keep_vitals(self.groups.catalogue()) {
                tracing::warn!(branch = branch.name(), "{error:#}");
            }
        }
    }

    /// All branches that can be used, by group and name.
    pub fn list(&self) -> Vec<Arc<Branch>> {
        let table = self.table();
        let open = table.values().filter_map(|entry| match entry {
            Entry::Open(branch) => Some(Arc::clone(branch)),
            _ => None,
        });
        open.collect()
    }

    /// Lets all logs end, also of a branch that is being made.
    pub fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.list().iter().for_each(|branch| branch.end());
    }

    /// A branch that the catalogue knows: opened, or why it cannot be. Its point is held first.
    fn opened(&self, name: &str, row: BranchRow, replica: &Arc<Replica>) -> Entry {
        let at = row.term.fork_seq;
        let (pin, why) = match replica.pin(at, holder(name)) {
            Err(oldest) => {
                let why =
                    format!("@seq:{at} of branch '{name}' is gone; the oldest is @seq:{oldest}");
                (None, why)
            }
            Ok(pin) => {
                let pin = Arc::new(pin);
                match self.run(name, &row, replica, &pin) {
                    Ok(branch) => return Entry::Open(branch),
                    Err(error) => (Some(pin), format!("{error:#}")),
                }
            }
        };
        tracing::error!(branch = %name, "{why}");
        let (name, parent) = (name.to_owned(), Arc::clone(replica));
        Entry::Broken(Broken { name, parent, row, why, _pin: pin })
    }

    /// Opens a branch and has its log's owner and its writer run.
    fn run(
        &self,
        name: &str,
        row: &BranchRow,
        replica: &Arc<Replica>,
        pin: &Arc<PinGuard>,
    ) -> anyhow::Result<Arc<Branch>> {
        let groups = &self.groups;
        let (store, catalogue, caches) = (groups.store(), groups.catalogue(), groups.caches());
        // What a crash has left in the middle is brought to its end, which takes room.
        let (branch, owner, task) = catalogue.reserve().with_room(|| {
            Branch::open(name, row.clone(), replica, pin, store, catalogue, caches)
        })?;
        groups.run_owner(owner)?;
        self.runtime.spawn(task);
        Ok(Arc::new(branch))
    }

    /// Removes what the table has given up: first all that works on it ends, then the rows go, then
    /// the files.
    async fn removed(
        &self,
        key: Key,
        branch: Option<Arc<Branch>>,
        mut broken: Broken,
    ) -> anyhow::Result<()> {
        if let Some(branch) = &branch {
            branch.end();
            branch.ended().await;
        }
        let machine = self.groups.machine().clone();
        let (groups, of) = (Arc::clone(&self.groups), key.clone());
        let forgotten = blocking(&machine, move || {
            if let Some(branch) = branch {
                branch.leave();
            }
            groups.catalogue().drop_branch(&of.0, &of.1)
        });
        if let Err(error) = forgotten.await {
            broken.why = format!(
                "the branch '{}' was to be dropped, and the catalogue cannot forget it ({error:#}): \
                 drop it again",
                broken.name
            );
            self.table().insert(key, Entry::Broken(broken));
            return Err(error);
        }
        let dir = branch_dir(&broken.parent, &broken.name);
        let own = machine.clone();
        let removed = blocking(&machine, move || {
            let what = || format!("the branch is dropped, but cannot remove {}", dir.display());
            own.remove_dir_all(&dir).with_context(what)
        });
        let removed = removed.await;
        self.table().remove(&key);
        removed
    }

    /// Removes what dropped branches have left.
    fn remove_remains(
        &self,
        replica: &Replica,
        known: &BTreeMap<String, BranchRow>,
    ) -> anyhow::Result<()> {
        let (machine, dir) = (self.groups.machine(), replica.dir().join("branches"));
        if !machine.exists(&dir) {
            return Ok(());
        }
        for entry in machine.list(&dir)? {
            if !known.contains_key(&entry.name) {
                machine.remove_dir_all(&dir.join(entry.name))?;
            }
        }
        Ok(())
    }

    fn absent(&self, group: &str, name: &str) -> BranchError {
        match self.unread.get(group) {
            Some(Unread { why, .. }) => BranchError::Failed(anyhow!("{why}")),
            None => BranchError::NotFound(format!("group '{group}' has no branch '{name}'")),
        }
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<Key, Entry>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn key(group: &str, name: &str) -> Key {
    (group.to_owned(), name.to_owned())
}

/// Who holds a branch's point, for people.
fn holder(name: &str) -> String {
    format!("the branch '{name}'")
}

fn busy(name: &str, what: &str) -> BranchError {
    BranchError::Conflict(format!("the branch '{name}' is being {what} at this moment"))
}

/// Which volumes a branch shows: their names and sizes at its point.
pub fn volumes(branch: &Branch) -> Vec<(String, tidemark_journal::VolumeId, u64)> {
    let seq = branch.row().term.fork_seq;
    let only = branch.row().volume.as_deref();
    branch.parent().ledger().history(|history| {
        let present = history.volumes.iter().filter(|volume| volume.present_at(seq));
        let wanted = present.filter(|volume| only.is_none_or(|only| only == volume.name));
        // A volume that cannot be recovered at the point by itself is not shown.
        let good = wanted.filter(|volume| {
            let scope = Scope::of(history, branch.parent().name(), Some(&volume.name));
            scope.is_ok_and(|scope| scope.newest_good(history, seq) == Some(seq))
        });
        good.map(|volume| (volume.name.clone(), volume.id, volume.sectors_at(seq))).collect()
    })
}

/// A name that no branch of the group has, be it that it cannot be opened.
fn made_up(group: &str, table: &BTreeMap<Key, Entry>) -> String {
    let base: String = group.chars().take(48).collect();
    let names = (1..).map(|number| format!("{base}-{number}"));
    let mut free = names.filter(|name| !table.contains_key(&key(group, name)));
    free.next().unwrap_or(base)
}
