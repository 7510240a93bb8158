//! A lease that was granted, on its way to the sender of the session in which it was asked for.

use std::sync::{Arc, Mutex, PoisonError};

use tidemark_link::message::LeaseGrant;

/// The newest grant of one session; with the session it is gone.
#[derive(Clone, Default)]
pub(super) struct Grants(Arc<Mutex<Option<LeaseGrant>>>);

impl Grants {
    /// Puts a grant in, in place of one that was not sent.
    pub fn put(&self, grant: LeaseGrant) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(grant);
    }

    /// Takes it out, to be sent.
    pub fn take(&self) -> Option<LeaseGrant> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
