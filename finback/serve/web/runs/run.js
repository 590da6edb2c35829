// One run: its recipe and state, its alerts, and its three views.
import { html } from "../lib.js";
import { Curves } from "./curves.js";
import { clock, cost } from "./format.js";
import { State } from "./list.js";
import { linkTo, stageId } from "./place.js";
import { Rollouts } from "./rollouts.js";
import { Stages } from "./stages.js";

const VIEWS = [
  ["stages", "Stages", Stages],
  ["curves", "Curves", Curves],
  ["rollouts", "Rollouts", Rollouts],
];

export function Run({ run, place }) {
  const [name, , View] = VIEWS.find(([view]) => view === place.view) ?? VIEWS[0];
  const alerts = [
    ...run.torn.map((file) => ({ kind: "torn", stage: file, text: "is torn: delete it and run the recipe again" })),
    ...run.stages.flatMap((stage) => stage.alerts.map((alert) => ({ ...alert, stage: stage.name }))),
  ];
  return html`
    <p class="crumbs"><a href="#">All runs</a></p>
    <div class="title"><h1>${run.name}</h1><${State} state=${run.state} /></div>
    <p class="under">Recipe ${run.recipe}, seed ${run.seed ?? "–"} · ${clock(run.seconds)} of work · <span title=${run.basis}>${cost(run)}, estimated</span></p>
    ${
      alerts.length > 0 &&
      html`
      <section class="alerts" aria-label="Alerts">
        <h2>${alerts.length === 1 ? "One thing to look at" : `${alerts.length} things to look at`}</h2>
        <ul>${alerts.slice(0, 8).map((a, i) => html`<li key=${i}><b>${a.stage}</b> ${a.text}${!["torn", "ledger"].includes(a.kind) && html` <a href=${linkTo({ run: run.name, view: "curves", stages: stageId(run.name, a.stage) })}>Curves</a>`}</li>`)}</ul>
      </section>`
    }
    <nav class="tabs" aria-label="Views">
      ${VIEWS.map(([view, text]) => html`<a key=${view} href=${linkTo({ run: run.name, view })} aria-current=${view === name ? "page" : undefined}>${text}</a>`)}
    </nav>
    <${View} run=${run} place=${{ ...place, view: name }} />`;
}
