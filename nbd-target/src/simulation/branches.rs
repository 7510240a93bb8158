//! Branches of a played target.

use std::{sync::Arc, time::Duration};

use tidemark_journal::SECTOR_BYTES;

use super::{ANSWER_MAX, NoContent, SimTarget};
use crate::{
    branch::{
        Branch, Change, WriteError,
        registry::{self, BranchError, Branches, NewBranch},
    },
    points::Refusal,
};

/// The longest that a change waits to be written, in played time.
const WRITE_MAX: Duration = Duration::from_secs(30);

impl SimTarget {
    /// Makes a branch.
    ///
    /// # Errors
    /// [`BranchError`].
    pub fn create_branch(&self, new: &NewBranch) -> Result<(), BranchError> {
        let _inside = self.runtime.enter();
        self.branches.create(new).map(|_| ())
    }

    /// Drops a branch.
    ///
    /// # Errors
    /// [`BranchError`].
    pub fn drop_branch(&self, group: &str, name: &str) -> Result<(), BranchError> {
        let dropped = async {
            tokio::time::timeout(ANSWER_MAX, self.branches.drop_branch(group, name)).await
        };
        let dropped = self.local.block_on(&self.runtime, dropped);
        dropped.map_err(|elapsed| BranchError::Failed(elapsed.into()))?
    }

    /// The branches, for what has no method here.
    pub fn branches(&self) -> &Arc<Branches> {
        &self.branches
    }

    /// Writes to a branch, as a client of it would.
    ///
    /// # Errors
    /// [`WriteError`]; also when it is not there, or is not answered in time.
    pub fn write_branch(
        &self,
        group: &str,
        name: &str,
        change: Change,
        durable: bool,
    ) -> Result<(), WriteError> {
        self.ask_branch(group, name, async |branch| branch.change(change, durable).await)
    }

    /// Flushes a branch, as a client of it would.
    ///
    /// # Errors
    /// [`WriteError`]; also when it is not there, or is not answered in time.
    pub fn flush_branch(&self, group: &str, name: &str) -> Result<(), WriteError> {
        self.ask_branch(group, name, async |branch| branch.sync().await)
    }

    fn ask_branch(
        &self,
        group: &str,
        name: &str,
        ask: impl AsyncFnOnce(&Branch) -> Result<(), WriteError>,
    ) -> Result<(), WriteError> {
        let closed = || WriteError::Closed("there is no such branch".to_owned());
        let branch = self.branches.get(group, name).ok_or_else(closed)?;
        let answer = async { tokio::time::timeout(WRITE_MAX, ask(&branch)).await };
        let answer = self.local.block_on(&self.runtime, answer);
        answer.map_err(|_| WriteError::Full("no answer in time".to_owned()))?
    }

    /// The names of the branches that can be used.
    pub fn branch_names(&self) -> Vec<String> {
        self.branches.list().iter().map(|branch| branch.name().to_owned()).collect()
    }

    /// The branches that cannot be used, with the reason.
    pub fn broken_branches(&self) -> Vec<(String, String)> {
        self.branches.broken().into_iter().map(|broken| (broken.name, broken.why)).collect()
    }

    /// A volume's content in a branch.
    ///
    /// # Errors
    /// [`NoContent`].
    pub fn branch_content(
        &self,
        group: &str,
        name: &str,
        volume: &str,
    ) -> Result<Vec<u8>, NoContent> {
        let _inside = self.runtime.enter();
        let absent = || NoContent::Absent(format!("there is no branch '{name}'"));
        let branch = self.branches.get(group, name).ok_or_else(absent)?;
        let found = registry::volumes(&branch).into_iter().find(|(name, ..)| name == volume);
        let (_, id, sectors) =
            found.ok_or_else(|| Refusal(format!("no volume '{volume}' in the branch")))?;
        let mut content = vec![0; (sectors * SECTOR_BYTES) as usize];
        branch.read(id, 0, sectors, &mut content)?;
        Ok(content)
    }
}
