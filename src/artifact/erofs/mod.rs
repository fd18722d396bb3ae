//! The erofs images that roots are.
