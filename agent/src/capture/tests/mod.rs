//! Tests of the capture core and of the ring.

mod busy;
mod cases;
mod checks;
mod inherit;
mod killed;
mod leases;
mod replica;
mod ring;
mod sim;
mod steps;
mod storage;
mod sync;
