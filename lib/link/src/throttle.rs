//! How fast frames may be sent, by the time of day.
