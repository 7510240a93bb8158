//! In emulated machines with real kernels: the ratios are of the path's length, since an emulated processor makes
//! cryptography and compression tens of times dearer than they are.

pub mod speed;
