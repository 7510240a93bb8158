//! All branches of a target, by name.

use std::{
    collections::BTreeMap,
    str::FromStr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::Context;
use tidemark_control::config::Name;
use tidemark_journal::Term;
use tokio::runtime::Handle;

use super::Branch;
use crate::{
    catalogue::BranchRow,
    groups::Groups,
    points::{
        Refusal, Spec,
        resolve::{Scope, resolve},
    },
    replica::Replica,
};

/// The branches.
pub struct Branches {
    groups: Arc<Groups>,
    runtime: Handle,
    table: Mutex<BTreeMap<String, Arc<Branch>>>,
    /// Those that the catalogue knows and that cannot be opened: to be shown, and dropped.
    broken: Mutex<BTreeMap<String, Broken>>,
}

/// A branch that cannot be opened.
#[derive(Clone)]
pub struct Broken {
    /// The replica it is a child of.
    pub parent: Arc<Replica>,
    /// What the catalogue has of it.
    pub row: BranchRow,
    /// Why, as a sentence.
    pub why: String,
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

impl From<Refusal> for BranchError {
    fn from(refusal: Refusal) -> BranchError {
        BranchError::Refused(refusal.0)
    }
}

impl Branches {
    /// The branches that the catalogue knows. One that cannot be opened does not keep the others
    /// from it.
    pub fn open(groups: &Arc<Groups>, runtime: Handle) -> Arc<Branches> {
        let branches = Branches {
            groups: Arc::clone(groups),
            runtime,
            table: Mutex::default(),
            broken: Mutex::default(),
        };
        for replica in groups.replicas() {
            let rows = match groups.catalogue().branches(replica.name()) {
                Ok(rows) => rows,
                Err(error) => {
                    replica.notice(format!("its branches cannot be read: {error:#}"));
                    continue;
                }
            };
            for (name, row) in rows {
                match branches.run(&name, row.clone(), &replica) {
                    Ok(branch) => {
                        branches.table().insert(name, branch);
                    }
                    Err(error) => {
                        tracing::error!(branch = %name, "{error:#}");
                        let (parent, why) = (Arc::clone(&replica), format!("{error:#}"));
                        branches.broken_table().insert(name, Broken { parent, row, why });
                    }
                }
            }
            if let Err(error) = branches.remove_remains(&replica) {
                tracing::warn!(group = replica.name(), "what dropped branches left: {error:#}");
            }
        }
        Arc::new(branches)
    }

    /// Makes a branch. Blocks on the disk.
    ///
    /// # Errors
    /// [`BranchError`].
    pub fn create(&self, new: &NewBranch) -> Result<Arc<Branch>, BranchError> {
        let replica = self
            .groups
            .replica(&new.group)
            .ok_or_else(|| BranchError::NotFound(self.groups.absence(&new.group)))?;
        let mut table = self.table();
        let name = match &new.name {
            Some(name) => name.clone(),
            None => made_up(&new.group, &table),
        };
        Name::from_str(&name).map_err(|error| BranchError::Refused(error.to_string()))?;
        if table.contains_key(&name) || self.broken_table().contains_key(&name) {
            return Err(BranchError::Conflict(format!("there is a branch '{name}' already")));
        }
        let seq = resolve(&replica, new.volume.as_deref(), &new.spec)?.seq;
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
        self.groups.catalogue().put_branch(&new.group, &name, &row)?;
        let branch = self.run(&name, row, &replica)?;
        table.insert(name, Arc::clone(&branch));
        Ok(branch)
    }

    /// Drops a branch and what was written into it. Blocks on the disk.
    ///
    /// # Errors
    /// [`BranchError`].
    pub fn drop_branch(&self, name: &str) -> Result<(), BranchError> {
        let mut table = self.table();
        let mut broken = self.broken_table();
        if let Some(Broken { parent, .. }) = broken.get(name) {
            self.groups.catalogue().drop_branch(parent.name(), name)?;
            let dir = super::branch_dir(parent, name);
            broken.remove(name);
            let removed = self.groups.machine().remove_dir_all(&dir);
            return Ok(removed.with_context(|| format!("cannot remove {}", dir.display()))?);
        }
        let branch = table
            .get(name)
            .ok_or_else(|| BranchError::NotFound(format!("there is no branch '{name}'")))?;
        if branch.clients() > 0 {
            return Err(BranchError::Conflict(format!(
                "the branch '{name}' is open ({} clients): disconnect them first",
                branch.clients()
            )));
        }
        self.groups.catalogue().drop_branch(branch.parent().name(), name)?;
        if let Some(branch) = table.remove(name) {
            branch.end();
            let removed = self.groups.machine().remove_dir_all(branch.dir());
            removed.with_context(|| format!("cannot remove {}", branch.dir().display()))?;
        }
        Ok(())
    }

    /// A branch.
    pub fn get(&self, name: &str) -> Option<Arc<Branch>> {
        self.table().get(name).cloned()
    }

    /// Those that cannot be opened, by name.
    pub fn broken(&self) -> BTreeMap<String, Broken> {
        self.broken_table().clone()
    }

    /// Once in a while: keeps in the catalogue how far the branches are durable, and drops temporary
    /// ones that nobody has had open for as long as `linger`. Blocks on the disk.
    pub fn look_after(&self, linger: Duration) {
        for branch in self.list() {
            if branch.row().temporary && branch.idle() >= linger {
                tracing::info!(
                    branch = branch.name(),
                    "temporary, and nobody has it open: dropped"
                );
                if let Err(error) = self.drop_branch(branch.name()) {
                    tracing::warn!(branch = branch.name(), "cannot drop it: {error}");
                }
            } else if let Err(error) = branch.keep_vitals(self.groups.catalogue()) {
                tracing::warn!(branch = branch.name(), "{error:#}");
            }
        }
    }

    /// All branches.
    pub fn list(&self) -> Vec<Arc<Branch>> {
        self.table().values().cloned().collect()
    }

    /// Lets all logs end.
    pub fn end(&self) {
        self.table().values().for_each(|branch| branch.end());
    }

    fn run(
        &self,
        name: &str,
        row: BranchRow,
        replica: &Arc<Replica>,
    ) -> anyhow::Result<Arc<Branch>> {
        let groups = &self.groups;
        let (branch, owner, task) =
            Branch::open(name, row, replica, groups.store(), groups.catalogue(), groups.caches())?;
        groups.run_owner(owner)?;
        self.runtime.spawn(task);
        Ok(Arc::new(branch))
    }

    /// Removes what dropped branches have left.
    fn remove_remains(&self, replica: &Replica) -> anyhow::Result<()> {
        let known = self.groups.catalogue().branches(replica.name())?;
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

    fn broken_table(&self) -> MutexGuard<'_, BTreeMap<String, Broken>> {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Branch>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
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

fn made_up(group: &str, table: &BTreeMap<String, Arc<Branch>>) -> String {
    let base: String = group.chars().take(48).collect();
    let names = (1..).map(|number| format!("{base}-{number}"));
    let mut free = names.filter(|name| !table.contains_key(name));
    free.next().unwrap_or(base)
}
