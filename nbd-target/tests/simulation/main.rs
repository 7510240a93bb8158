//! A target that is played on a simulated disk, and a source that knows what every position holds.

mod every_crash;
mod failing;
mod lease;
mod random;
mod source;
mod window;
