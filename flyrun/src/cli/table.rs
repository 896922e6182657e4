//! Tables as docker prints them: columns by spaces, no lines.

use comfy_table::Table;
use comfy_table::presets::NOTHING;

/// A table with these headings.
pub fn new(headings: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING).set_header(headings.iter().copied());
    table
}

/// Its lines, without the blanks at both ends.
pub fn text(table: &Table) -> String {
    let text = table.to_string();
    text.lines().map(|line| line.strip_prefix(' ').unwrap_or(line).trim_end()).collect::<Vec<_>>().join("\n")
}
