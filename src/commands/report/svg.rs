//! Inline SVG. Colours come from the page's style sheet, by class, so that they follow light and dark.

use std::fmt::Write as _;

/// A drawing that grows element by element.
pub(super) struct Svg {
    width: f64,
    height: f64,
    label: String,
    body: String,
}

impl Svg {
    /// `label` says to those who can't see it what the drawing shows.
    pub(super) fn new(width: f64, height: f64, label: &str) -> Self {
        Self {
            width,
            height,
            label: label.to_owned(),
            body: String::new(),
        }
    }

    pub(super) fn line(&mut self, class: &str, from: (f64, f64), to: (f64, f64)) {
        self.push(format_args!(
            r#"<line class="{class}" x1="{:.1}" y1="{:.1}" x2="{:.1}" y2="{:.1}"/>"#,
            from.0, from.1, to.0, to.1
        ));
    }

    pub(super) fn path(&mut self, class: &str, points: &[(f64, f64)], title: &str) {
        let mut list = String::new();
        for (x, y) in points {
            // Writing to a string cannot fail.
            let _ = write!(list, "{x:.1},{y:.1} ");
        }
        self.push(format_args!(
            r#"<polyline class="{class}" points="{}">{}</polyline>"#,
            list.trim_end(),
            titled(title)
        ));
    }

    pub(super) fn area(&mut self, class: &str, points: &[(f64, f64)]) {
        let list: Vec<String> = points
            .iter()
            .map(|(x, y)| format!("{x:.1},{y:.1}"))
            .collect();
        self.push(format_args!(
            r#"<polygon class="{class}" points="{}"/>"#,
            list.join(" ")
        ));
    }

    pub(super) fn dot(&mut self, class: &str, at: (f64, f64), radius: f64, title: &str) {
        self.push(format_args!(
            r#"<circle class="{class}" cx="{:.1}" cy="{:.1}" r="{radius}">{}</circle>"#,
            at.0,
            at.1,
            titled(title)
        ));
    }

    pub(super) fn bar(&mut self, class: &str, corner: (f64, f64), size: (f64, f64), title: &str) {
        self.push(format_args!(
            r#"<rect class="{class}" x="{:.1}" y="{:.1}" width="{:.1}" height="{:.1}">{}</rect>"#,
            corner.0,
            corner.1,
            size.0.max(0.0),
            size.1.max(0.0),
            titled(title)
        ));
    }

    /// `anchor` is start, middle or end.
    pub(super) fn text(&mut self, anchor: &str, at: (f64, f64), text: &str) {
        self.push(format_args!(
            r#"<text text-anchor="{anchor}" x="{:.1}" y="{:.1}">{}</text>"#,
            at.0,
            at.1,
            escaped(text)
        ));
    }

    pub(super) fn finish(self) -> String {
        format!(
            r#"<svg role="img" aria-label="{}" viewBox="0 0 {w} {h}" width="{w}" height="{h}">{}</svg>"#,
            escaped(&self.label),
            self.body,
            w = self.width,
            h = self.height
        )
    }

    fn push(&mut self, element: std::fmt::Arguments<'_>) {
        // Writing to a string cannot fail.
        let _ = self.body.write_fmt(element);
    }
}

/// A rectangle of the drawing with a scale on both sides.
pub(super) struct Plot {
    left: f64,
    top: f64,
    width: f64,
    height: f64,
    x: (f64, f64),
    y: (f64, f64),
    /// Places between whole numbers, such as trials, get no mark.
    whole_x: bool,
}

impl Plot {
    /// The whole of a drawing, less the room for labels; the ranges are those of `points`, a little widened.
    pub(super) fn around(svg: &Svg, points: &[(f64, f64)]) -> Self {
        Self {
            left: 68.0,
            top: 26.0,
            width: svg.width - 84.0,
            height: svg.height - 70.0,
            x: range(points.iter().map(|point| point.0)),
            y: range(points.iter().map(|point| point.1)),
            whole_x: points.iter().all(|point| point.0.fract() == 0.0),
        }
    }

    pub(super) fn at(&self, (x, y): (f64, f64)) -> (f64, f64) {
        let (x, y) = (
            (x - self.x.0) / (self.x.1 - self.x.0),
            (y - self.y.0) / (self.y.1 - self.y.0),
        );
        (
            self.left + x * self.width,
            self.top + (1.0 - y) * self.height,
        )
    }

    pub(super) fn axes(&self, svg: &mut Svg, x_label: &str, y_label: &str) {
        let bottom = self.top + self.height;
        let marks = ticks(self.y.0, self.y.1, 5);
        for tick in &marks {
            let tick = *tick;
            let (_, y) = self.at((self.x.0, tick));
            svg.line("grid", (self.left, y), (self.left + self.width, y));
            svg.text("end", (self.left - 8.0, y + 4.0), &mark(tick, &marks));
        }
        let mut marks = ticks(self.x.0, self.x.1, 8);
        marks.retain(|tick| !self.whole_x || tick.fract() == 0.0);
        for tick in &marks {
            let tick = *tick;
            let (x, _) = self.at((tick, self.y.0));
            svg.text("middle", (x, bottom + 18.0), &mark(tick, &marks));
        }
        svg.line(
            "axis",
            (self.left, bottom),
            (self.left + self.width, bottom),
        );
        svg.text(
            "middle",
            (self.left + self.width / 2.0, bottom + 38.0),
            x_label,
        );
        svg.text("start", (8.0, self.top - 14.0), y_label);
    }
}

fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values
        .filter(|value| value.is_finite())
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
            (low.min(value), high.max(value))
        });
    if low > high {
        return (0.0, 1.0);
    }
    let margin = if high - low > 1e-9 * high.abs() {
        (high - low) * 0.06
    } else {
        (high.abs() * 0.1).max(1e-9)
    };
    (low - margin, high + margin)
}

/// Round numbers inside a range, about `wanted` of them.
fn ticks(low: f64, high: f64, wanted: usize) -> Vec<f64> {
    let rough = (high - low) / wanted as f64;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|factor| factor * power)
        .find(|step| *step >= rough)
        .unwrap_or(power);
    let first = (low / step).ceil() as i64;
    (first..)
        .map(|i| i as f64 * step)
        .take_while(|tick| *tick <= high)
        .take(2 * wanted + 2)
        .collect()
}

/// A tick's number, with as many digits as tell it from its neighbours.
fn mark(tick: f64, all: &[f64]) -> String {
    let step = all.windows(2).map(|pair| pair[1] - pair[0]).next();
    let step = step.unwrap_or(1.0);
    let large = all.iter().any(|tick| tick.abs() >= 1e6);
    if step < 1e-6 || large {
        return format!("{tick:.2e}");
    }
    // A step of 0.1 that rounding made a little smaller is still one of 0.1.
    let digits = (-(step * 1.001).log10().floor()).max(0.0) as usize;
    format!("{tick:.digits$}")
}

/// A number in few characters.
pub(super) fn number(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    let size = value.abs();
    if !(1e-3..1e6).contains(&size) {
        return format!("{value:.1e}");
    }
    let digits = if size >= 1000.0 {
        0
    } else if size >= 10.0 {
        2
    } else {
        4
    };
    let text = format!("{value:.digits$}");
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        text
    }
}

fn titled(title: &str) -> String {
    if title.is_empty() {
        String::new()
    } else {
        format!("<title>{}</title>", escaped(title))
    }
}

pub(super) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(ticks(0.0, 10.0, 5), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(ticks(-1.0, 1.0, 4), [-1.0, -0.5, 0.0, 0.5, 1.0]);
        let close = [0.3406, 0.3407];
        assert_eq!(mark(close[1], &close), "0.3407");
        assert_eq!(mark(20.0, &[10.0, 20.0]), "20");
    }

    #[test]
    fn numbers_are_short() {
        for (value, text) in [
            (0.0, "0"),
            (21.5, "21.5"),
            (0.123_456, "0.1235"),
            (12_345.6, "12346"),
            (1e-8, "1.0e-8"),
            (-3.0, "-3"),
        ] {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn text_is_escaped() {
        let mut svg = Svg::new(10.0, 10.0, "a<b");
        svg.text("start", (0.0, 0.0), "<script>");
        let drawn = svg.finish();
        assert!(drawn.contains("a&lt;b") && drawn.contains("&lt;script&gt;"));
    }
}
