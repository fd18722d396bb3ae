//! Times as FAT has them: local without a zone, which here is UTC, in steps of two seconds from 1980 to 2107.

use crate::tree::Timestamp;

const DAY_SECONDS: i64 = 86_400;
/// 1980-01-01 00:00:00 and 2107-12-31 23:59:58.
const FIRST: i64 = 315_532_800;
const LAST: i64 = 4_354_819_198;

/// Time and date words; the nearest that there is.
pub(super) fn words(time: Timestamp) -> (u16, u16) {
    let seconds = time.seconds.clamp(FIRST, LAST);
    let (days, second) = (seconds.div_euclid(DAY_SECONDS), seconds.rem_euclid(DAY_SECONDS));
    // Days from 0000-03-01, so that a leap day is a year's last; 400 years are 146,097 days.
    let days = days + 719_468;
    let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year_of_era + i64::from(month <= 2);
    let date = (year - 1980) << 9 | month << 5 | day;
    let time = (second / 3600) << 11 | (second / 60 % 60) << 5 | (second % 60 / 2);
    // Both are within sixteen bits for the times that are left.
    (u16::try_from(time).unwrap_or_default(), u16::try_from(date).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_the_calendars() {
        let shown = |seconds| {
            let (time, date) = words(Timestamp { seconds, nanoseconds: 0 });
            let date = format!("{}-{:02}-{:02}", 1980 + (date >> 9), date >> 5 & 15, date & 31);
            format!("{date} {:02}:{:02}:{:02}", time >> 11, time >> 5 & 63, (time & 31) * 2)
        };
        for (seconds, expected) in [
            (1_700_000_000, "2023-11-14 22:13:20"),
            (951_782_401, "2000-02-29 00:00:00"),
            (951_868_799, "2000-02-29 23:59:58"),
            (i64::MIN, "1980-01-01 00:00:00"),
            (FIRST, "1980-01-01 00:00:00"),
            (LAST, "2107-12-31 23:59:58"),
            (i64::MAX, "2107-12-31 23:59:58"),
        ] {
            assert_eq!(shown(seconds), expected);
        }
    }
}
