use proptest::prelude::*;

use super::*;

#[test]
fn table2_has_the_papers_size() {
    let space = Space::table2();
    assert_eq!(space.combinations(), Some(25_920));
    assert_eq!(space.distinct(), Some(20_160));
    let names: Vec<&str> = space.names().collect();
    let expected = [
        "hard_weight",
        "soft_weight",
        "scaling_value",
        "logits_norm",
        "hidden_norm",
        "layers",
        "kd_type",
    ];
    assert_eq!(names, expected);
    let points = space.enumerate().unwrap();
    let first = space.params(&points[0]);
    assert_eq!(
        first.to_json(),
        r#"{"hard_weight":0.1,"soft_weight":1e-8,"scaling_value":1,"logits_norm":"none","hidden_norm":"none","layers":"none","kd_type":"kl"}"#
    );
    let keys: std::collections::BTreeSet<_> = points.iter().map(|p| key(p)).collect();
    assert_eq!(keys.len(), points.len());
    for point in points.iter().step_by(7) {
        assert_eq!(&space.point(&space.params(point)).unwrap(), point);
    }
}

#[test]
fn inactive_parameters_have_one_value() {
    let space = Space::table2();
    let mut point = space.enumerate().unwrap()[0].clone();
    point[4] = 2.0;
    space.canonicalise(&mut point);
    assert_eq!(point[4], 0.0);
    let params: Params = serde_json::from_str(
        r#"{"kd_type":"kl","hard_weight":1,"soft_weight":1.0,"scaling_value":3.0,"logits_norm":"none","hidden_norm":"max-min","layers":"none"}"#,
    )
    .unwrap();
    assert_eq!(
        space.canonical(&params).unwrap().to_json(),
        r#"{"hard_weight":1.0,"soft_weight":1.0,"scaling_value":3,"logits_norm":"none","hidden_norm":"none","layers":"none","kd_type":"kl"}"#
    );
}

/// Only what nothing can be done with goes, with its reason; what depends on it needs no word of its own.
#[test]
fn impossible_levels_are_left_out() {
    let space = Space::table2();
    let text = |params: &Params, name: &str| params.get(name).unwrap().to_string();
    let mut asked = 0;
    let (whole, impossible) = space
        .narrowed(|_| {
            asked += 1;
            Ok(())
        })
        .unwrap();
    assert_eq!((whole, impossible), (space.clone(), vec![]));
    assert!(asked <= 41, "one for each level at most: {asked}");

    let no_hidden = |params: &Params| match text(params, "layers").as_str() {
        "none" => Ok(()),
        layers => Err(format!("no {layers}")),
    };
    let (narrow, impossible) = space.narrowed(no_hidden).unwrap();
    let said: Vec<_> = impossible
        .iter()
        .map(|level| (level.parameter.as_str(), level.reason.as_str()))
        .collect();
    assert_eq!(said, [("layers", "no last"), ("layers", "no last-middle")]);
    assert_eq!(narrow.distinct(), Some(4 * 6 * 20 * 3 * 2));
    assert_eq!(
        narrow.narrowed(no_hidden).unwrap(),
        (narrow.clone(), vec![])
    );
    assert_eq!(Space::from_json(&narrow.to_json()).unwrap(), narrow);

    // A combination alone takes no level away.
    let pair = |params: &Params| match (text(params, "layers"), text(params, "kd_type")) {
        (layers, kd) if layers == "last" && kd == "kl" => Err("not these two".to_owned()),
        _ => Ok(()),
    };
    assert_eq!(space.narrowed(pair).unwrap(), (space.clone(), vec![]));
    let error = space.narrowed(|_| Err("nothing".to_owned())).unwrap_err();
    assert!(matches!(error, Error::SpaceEmpty { .. }), "{error}");
}

#[test]
fn json_form_is_faithful() {
    let space = Space::table2();
    assert_eq!(Space::from_json(&space.to_json()).unwrap(), space);
}

#[test]
fn chains_of_conditions_are_followed() {
    let space = Space::from_toml(
        r#"
        [[param]]
        name = "c"
        kind = "categorical"
        values = [1, 2]
        when = { b = true }
        [[param]]
        name = "b"
        kind = "categorical"
        values = [false, true]
        when = { a = "yes" }
        [[param]]
        name = "a"
        kind = "categorical"
        values = ["no", "yes"]
        "#,
    )
    .unwrap();
    // a = no; a = yes, b = false; a = yes, b = true with two values of c.
    assert_eq!(space.distinct(), Some(4));
}

#[test]
fn forbidden_combinations_are_left_out() {
    let space = Space::from_toml(
        r#"
        [[param]]
        name = "a"
        kind = "int"
        low = 0
        high = 3
        [[param]]
        name = "b"
        kind = "ordinal"
        values = [0.5, 1, 2]
        [[forbid]]
        a = [0, 1]
        b = 1.0
        "#,
    )
    .unwrap();
    assert_eq!(
        (space.combinations(), space.distinct()),
        (Some(12), Some(10))
    );
    let forbidden = Params::new(vec![
        ("a".to_owned(), Value::Integer(1)),
        ("b".to_owned(), Value::Integer(1)),
    ]);
    assert!(matches!(
        space.canonical(&forbidden),
        Err(Error::Params { .. })
    ));
}

#[test]
fn bad_spaces_get_good_errors() {
    let check = |toml: &str, expected: &[&str]| {
        let error = Space::from_toml(toml).unwrap_err();
        assert!(error.is_user());
        for part in expected {
            assert!(error.to_string().contains(part), "{error}");
        }
    };
    check("", &["param"]);
    check("param = []", &["no [[param]]"]);
    check(
        "[[param]]\nname = 'a'\nkind = 'real'",
        &["line 3", "unknown variant `real`"],
    );
    check(
        "[[param]]\nname = 'a'\nkind = 'int'\nlow = 1\nhihg = 2",
        &["unknown field `hihg`"],
    );
    check(
        "[[param]]\nname = 'a'\nkind = 'int'\nlow = 1",
        &["`a`", "`high` is missing"],
    );
    check(
        "[[param]]\nname = 'a'\nkind = 'int'\nlow = 1.5\nhigh = 2",
        &["`low` must be a whole number"],
    );
    check(
        "[[param]]\nname = 'a'\nkind = 'int'\nlow = 5\nhigh = 2",
        &["low = 5 is above high = 2"],
    );
    check(
        "[[param]]\nname = 'a'\nkind = 'float'\nlow = 0.0\nhigh = 1.0\nlog = true",
        &["low > 0"],
    );
    check(
        "[[param]]\nname = 'a'\nkind = 'float'\nlow = nan\nhigh = 1.0",
        &["finite number"],
    );
    check(
        "[[param]]\nname = 'a'\nkind = 'float'\nlow = 0\nhigh = 1\nvalues = [1]",
        &["`values` does not go with kind = float"],
    );
    check(
        "[[param]]\nname = 'a'\nkind = 'ordinal'\nvalues = [2, 1]",
        &["must ascend"],
    );
    check(
        "[[param]]\nname = 'a'\nkind = 'ordinal'\nvalues = ['x']",
        &["finite number, not x"],
    );
    check(
        "[[param]]\nname = 'a'\nkind = 'categorical'\nvalues = []",
        &["at least one"],
    );
    check(
        "[[param]]\nname = 'a'\nkind = 'categorical'\nvalues = ['x', 'x']",
        &["x is listed twice"],
    );
    let two = "[[param]]\nname = 'a'\nkind = 'int'\nlow = 0\nhigh = 1\n[[param]]\nname = 'b'\nkind = 'int'\nlow = 0\nhigh = 1\n";
    check(&two.replace("'b'", "'a'"), &["used twice", "line 7"]);
    check(
        &format!("{two}when = {{ z = 1 }}"),
        &["`b`", "`z`, which is no parameter (line 7)"],
    );
    check(&format!("{two}when = {{ a = 7 }}"), &["`a` is never 7"]);
    check(
        &format!("{two}when = {{ a = [] }}"),
        &["the list for `a` is empty"],
    );
    check(&format!("{two}when = {{ b = 1 }}"), &["depends on itself"]);
    check(&format!("{two}inactive = 1"), &["needs a `when`"]);
    check(
        &format!("{two}when = {{ a = 1 }}\ninactive = 4"),
        &["cannot be 4"],
    );
    check(
        &format!("{two}[[forbid]]"),
        &["would forbid everything (line 11)"],
    );
    check(
        &format!("{two}[[forbid]]\na = [0, 1]"),
        &["every combination is forbidden"],
    );
    check(
        "[[param]]\nname = 'f'\nkind = 'float'\nlow = 0\nhigh = 1\n[[param]]\nname = 'a'\nkind = 'categorical'\nvalues = [1, 2]\n[[forbid]]\na = [1, 2]",
        &["not forbidden"],
    );
    for (low, high, log) in [("1e9", "1000000000.001", false), ("1e-320", "1e-310", true)] {
        check(
            &format!(
                "[[param]]\nname = 'a'\nkind = 'float'\nlow = {low}\nhigh = {high}\nlog = {log}"
            ),
            &["`a`", "too narrow"],
        );
    }
    check(
        "[[param]]\nname = 'a'\nkind = 'int'\nlow = 1152921504606846976\nhigh = 1152921504606846986",
        &["beyond ±2^53"],
    );
    check(
        "[[param]]\nname = 'a'\nkind = 'float'\nlow = 0\nhigh = 1\n[[forbid]]\na = 0.5",
        &["is a float"],
    );
}

#[test]
fn logarithmic_places() {
    let space = Space::table2();
    let place = |j: usize, code: f64| space.parameters()[j].domain().place(code);
    assert_eq!((place(0, 0.0), place(0, 3.0)), (0.0, 1.0));
    assert!((place(0, 1.0) - 10f64.ln() / 200f64.ln()).abs() < 1e-12);
    // 1…20 is a range of whole numbers, not a logarithmic one.
    assert!((place(2, 9.0) - 9.0 / 19.0).abs() < 1e-12);
}

proptest! {
    #[test]
    fn any_position_is_a_valid_configuration(unit in proptest::collection::vec(0.0..=1.0f64, 4)) {
        let space = Space::from_toml(
            "[[param]]\nname = 'f'\nkind = 'float'\nlow = 1e-6\nhigh = 10.0\nlog = true\n\
             [[param]]\nname = 'i'\nkind = 'int'\nlow = 3\nhigh = 300\nlog = true\n\
             [[param]]\nname = 'o'\nkind = 'ordinal'\nvalues = [1, 3, 900]\n\
             [[param]]\nname = 'c'\nkind = 'categorical'\nvalues = ['x', 'y']\nwhen = { o = 900 }\n",
        ).unwrap();
        let point = space.point_at(&unit);
        let params = space.params(&point);
        let again = space.point(&params).unwrap();
        prop_assert_eq!(space.params(&again), params);
        for (p, (a, b)) in space.parameters().iter().zip(point.iter().zip(&again)) {
            prop_assert!((p.domain().place(*a) - p.domain().place(*b)).abs() < 1e-12);
        }
    }
}
