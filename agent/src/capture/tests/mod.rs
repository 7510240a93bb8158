//! Tests of the capture core and of the ring.

mod cases;
mod replica;
mod ring;
mod sim;
mod steps;
