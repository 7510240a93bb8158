//! Records, frames, chunks and segments: the one format from the agent's ring to the target's log.
