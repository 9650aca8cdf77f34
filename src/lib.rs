//! OLOL
