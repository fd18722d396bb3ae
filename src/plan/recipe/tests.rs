use super::*;

fn fault(text: &str) -> Fault {
    Recipe::parse(text, "kiln.toml").expect_err("it is wrong")
}

#[test]
fn an_unknown_key_is_named_with_its_place_and_the_nearest_known_one() {
    for (text, place, meant) in [
        ("projct = \"a\"\n", (1, 1), "`project`"),
        ("[steps.a]\nrun = \"x\"\notuputs = [\"b\"]\n", (3, 1), "`outputs`"),
        ("[steps.a]\nrun = \"x\"\nlimits = { memry = \"1G\" }\n", (3, 12), "`memory`"),
        ("[roots.b]\nfrm = \"debian:bookworm\"\n", (2, 1), "`from`"),
        ("[settings.debian]\nsecurity_mirror = \"x\"\n", (2, 1), "`security-mirror`"),
    ] {
        let fault = fault(text);
        assert_eq!((fault.line, fault.column), place, "{fault}");
        assert!(fault.hint.as_deref().is_some_and(|hint| hint.contains(meant)), "{fault:?}");
    }
}

#[test]
fn the_template_is_a_good_recipe() {
    let recipe = Recipe::parse(TEMPLATE, "kiln.toml").expect("good");
    assert_eq!(expand(&recipe, TEMPLATE, "kiln.toml").expect("good").all.len(), 2);
}

#[test]
fn the_schema_knows_every_key_and_no_other() {
    let schema = serde_json::to_value(Recipe::schema()).expect("a schema");
    assert_eq!(schema["additionalProperties"], false);
    let step = &schema["$defs"]["StepTable"];
    assert!(step["properties"]["pass-env"].is_object() && step["properties"]["interpreter"].is_object());
    assert_eq!(step["additionalProperties"], false);
    assert!(schema["properties"]["steps"]["additionalProperties"].is_object());
}

#[test]
fn a_matrix_makes_a_step_of_each_combination() {
    let text = "[steps.t]\nmatrix = { py = [\"3.11\", \"3.12\"], os = [\"a\", \"b\"] }\n\
                run = \"tox -e %{py} # ${py} %{other}\"\noutputs = [\"r/%{os}/%{py}\"]\n";
    let recipe = Recipe::parse(text, "kiln.toml").expect("good");
    let steps = expand(&recipe, text, "kiln.toml").expect("good").all;
    let names: Vec<&str> = steps.iter().map(|step| step.name.as_str()).collect();
    assert_eq!(names, ["t-a-3.11", "t-a-3.12", "t-b-3.11", "t-b-3.12"]);
    assert_eq!(steps[0].table.run.as_ref().expect("set").get_ref(), "tox -e 3.11 # ${py} %{other}");
    assert_eq!(steps[0].table.outputs[0].get_ref(), "r/a/3.11");
}

#[test]
fn variables_are_filled_in_and_leave_steps_out() {
    let text = "variables = { layout = \"one\" }\n[steps.a]\nrun = \"%{layout} %{v}\"\nmatrix = { v = [\"x\", \"y\"] }\n\
                when = { layout = \"one\" }\n[steps.b]\nrun = \"b\"\nmatrix = { v = [\"x\"] }\nwhen = { layout = \"two\" }\n\
                [steps.c]\nrun = \"c\"\nneeds = [\"a\", \"b\", \"b-x\"]\n";
    let recipe = Recipe::parse(text, "kiln.toml").expect("good");
    let Steps { all, left_out } = expand(&recipe, text, "kiln.toml").expect("good");
    assert_eq!(all.iter().map(|step| step.name.as_str()).collect::<Vec<_>>(), ["a-x", "a-y", "c"]);
    assert_eq!(all[1].table.run.as_ref().expect("set").get_ref(), "one y");
    assert_eq!(all[2].table.needs.iter().map(|need| need.get_ref().as_str()).collect::<Vec<_>>(), ["a"]);
    assert_eq!(left_out.into_iter().collect::<Vec<_>>(), ["b", "b-x"]);
    for (text, line) in [
        ("variables = { layout = \"one\" }\n[steps.a]\nrun = \"x\"\nwhen = { layuot = \"one\" }\n", 4),
        ("variables = { v = \"one\" }\n[steps.a]\nrun = \"x\"\nmatrix = { v = [\"x\"] }\n", 4),
        ("variables = { \"a b\" = \"one\" }\n[steps.a]\nrun = \"x\"\n", 1),
    ] {
        let recipe = Recipe::parse(text, "kiln.toml").expect("it parses");
        assert_eq!(expand(&recipe, text, "kiln.toml").expect_err("it is refused").line, line, "{text}");
    }
}

#[test]
fn names_that_are_none_and_names_that_meet_are_refused() {
    for text in [
        "[steps.\"a/b\"]\nrun = \"x\"\n",
        "[steps.\"-a\"]\nrun = \"x\"\n",
        "[steps.a]\nrun = \"x\"\nmatrix = { v = [] }\n",
        "[steps.a]\nrun = \"x\"\nmatrix = { v = [\"../x\"] }\n",
        "[steps.a]\nrun = \"x\"\nmatrix = { v = [\"b\"] }\n[steps.a-b]\nrun = \"x\"\n",
    ] {
        let recipe = Recipe::parse(text, "kiln.toml").expect("it parses");
        assert!(expand(&recipe, text, "kiln.toml").is_err(), "{text}");
    }
}

#[test]
fn matrices_together_make_no_more_steps_than_a_recipe_may_have() {
    let values: Vec<String> = (0..1000).map(|value| format!("\"{value}\"")).collect();
    let values = values.join(",");
    let step = |name: u32| format!("[steps.s{name:02}]\nrun = \"x\"\nmatrix = {{ v = [{values}] }}\n");
    let text: String = (0..21).map(step).collect();
    let recipe = Recipe::parse(&text, "kiln.toml").expect("it parses");
    let fault = expand(&recipe, &text, "kiln.toml").expect_err("it is refused");
    assert_eq!(
        (fault.line, fault.message.as_str()),
        (61, "with step `s20` the recipe has more than 20000 steps")
    );
}
