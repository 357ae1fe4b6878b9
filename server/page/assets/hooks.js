// Hooks: the installed ones in their order, with their settings; and the catalogue, to add one.

import { all, get, modelPath, send } from "./api.js";
import { html, useState } from "./html.js";
import { useResource } from "./look.js";
import { Ask, Button, EditAnswer, EditButtons, Loading, ProblemNote, Section, useEdit } from "./parts.js";
import { SchemaFields, changesIn } from "./schema_form.js";
import { plural, shown, spaced, whole } from "./words.js";

// The schema of a hook's settings. Of several (such as one of each scheduler), the one that is chosen.
function schemaOf(kind, chosen) {
  const { discriminator } = kind.settings;
  if (!discriminator) return { schema: kind.settings, by: null, choices: [] };
  const choices = Object.keys(discriminator.mapping).sort();
  const name = discriminator.mapping[chosen ?? choices[0]]?.split("/").at(-1);
  return { schema: kind.settings.$defs[name] ?? { properties: {} }, by: discriminator.propertyName, choices };
}

// What a nested object of settings has to have, as text to begin with; and what it may have, in words.
function nested(schema, root) {
  const drafts = {};
  const helps = {};
  for (const [name, field] of Object.entries(schema.properties ?? {})) {
    const inner = field.$ref && root.$defs[field.$ref.split("/").at(-1)];
    if (!inner?.properties) continue;
    const required = inner.required ?? [];
    const example = ({ type }) => (type === "array" ? [] : type === "string" ? "" : 1);
    drafts[name] = JSON.stringify(Object.fromEntries(required.map((key) => [key, example(inner.properties[key])])));
    helps[name] = Object.entries(inner.properties)
      .map(([key, { default: usual }]) => (required.includes(key) ? key : `${key} (${shown(usual)})`))
      .join(", ");
  }
  return { drafts, helps };
}

function withHelp(schema, helps) {
  const properties = Object.entries(schema.properties ?? {}).map(([name, field]) => [name, name in helps ? { ...field, description: helps[name] } : field]);
  return { ...schema, properties: Object.fromEntries(properties) };
}

function Add({ name, catalogue, again }) {
  const [kindName, setKindName] = useState(catalogue[0].name);
  const kind = catalogue.find((each) => each.name === kindName);
  const [point, setPoint] = useState(null);
  const [chosen, setChosen] = useState(null);
  const [draft, setDraft] = useState({});
  const [isFirst, setIsFirst] = useState(false);
  const { schema: plain, by, choices } = schemaOf(kind, chosen);
  const { drafts, helps } = nested(plain, kind.settings);
  const schema = withHelp(plain, helps);
  const at = point && kind.points.includes(point) ? point : kind.points[0];
  const edit = useEdit(
    (dryRun) => {
      const settings = changesIn({ ...drafts, ...draft }, schema, kind.settings);
      if (by) settings[by] = chosen ?? choices[0];
      const body = { name: kind.name, point: at, settings, prepend: isFirst };
      return send("POST", modelPath(name, "hooks"), body, { query: { dry_run: dryRun || undefined } });
    },
    {
      onDone: () => {
        setDraft({});
        return again();
      },
    },
  );
  function choose(event) {
    setKindName(event.target.value);
    setPoint(null);
    setChosen(null);
    setDraft({});
    edit.clear();
  }
  return html`<${Section} title="Add a hook">
    <div class="fields">
      <div class="field"><label for="hook-name">Hook</label>
        <select id="hook-name" value=${kindName} onChange=${choose}>
          ${catalogue.map((each) => html`<option value=${each.name}>${each.name} (${each.kind})</option>`)}
        </select></div>
      <div class="field"><label for="hook-point">Point</label>
        <select id="hook-point" value=${at} onChange=${(event) => setPoint(event.target.value)}>
          ${kind.points.map((each) => html`<option value=${each}>${each}</option>`)}
        </select></div>
      ${by && html`<div class="field"><label for="hook-choice">${by}</label>
        <select id="hook-choice" value=${chosen ?? choices[0]} onChange=${(event) => {
          setChosen(event.target.value);
          setDraft({});
        }}>${choices.map((each) => html`<option value=${each}>${each}</option>`)}</select></div>`}
    </div>
    <p class="quiet about">${kind.description.split("\n\n")[0]}</p>
    <${SchemaFields} key=${`${kindName} ${chosen}`} prefix="new-hook" schema=${schema} root=${kind.settings} skip=${[by]}
      values=${Object.fromEntries(Object.entries(drafts).map(([field, text]) => [field, JSON.parse(text)]))} draft=${draft} onDraft=${setDraft} />
    <div class="actions"><label class="check" for="hook-first">
      <input id="hook-first" type="checkbox" checked=${isFirst} onChange=${(event) => setIsFirst(event.target.checked)} />
      Before the hooks that are there
    </label></div>
    <${EditButtons} edit=${edit} isChanged=${true} word="Add" />
    <${EditAnswer} edit=${edit} what=${`${kindName} was added`} />
  </${Section}>`;
}

function Settings({ name, hook, kind, again }) {
  const [draft, setDraft] = useState({});
  const { schema, by } = schemaOf(kind, hook.settings.scheduler);
  const edit = useEdit(
    async (dryRun) => {
      const below = modelPath(name, "hooks", hook.id);
      const { etag } = await get(below);
      return send("PATCH", below, { settings: changesIn(draft, schema, kind.settings) }, { query: { dry_run: dryRun || undefined }, etag });
    },
    {
      onDone: () => {
        setDraft({});
        return again();
      },
      onStale: again,
    },
  );
  if (!Object.keys(schema.properties ?? {}).length) return null;
  return html`<${SchemaFields} prefix=${hook.id} schema=${schema} root=${kind.settings} values=${hook.settings} draft=${draft} onDraft=${setDraft} skip=${[by]} />
    <${EditButtons} edit=${edit} isChanged=${Object.keys(draft).length > 0} />
    <${EditAnswer} edit=${edit} />`;
}

function Installed({ name, hook, kind, place, last, mayEdit, again, onRemove, onMove }) {
  const lost = [hook.failures && plural(hook.failures, "failure"), hook.dropped && `${whole(hook.dropped)} dropped`].filter(Boolean);
  const buttons = mayEdit && html`<div class="actions">
    <${Button} disabled=${place === 0} aria-label=${`Move ${hook.id} up`} onClick=${() => onMove(hook, place - 1)}>↑</${Button}>
    <${Button} disabled=${place === last} aria-label=${`Move ${hook.id} down`} onClick=${() => onMove(hook, place + 1)}>↓</${Button}>
    <${Button} aria-label=${`Remove ${hook.id}`} onClick=${() => onRemove(hook)}>Remove</${Button}>
  </div>`;
  return html`<${Section} title=${`${place + 1}. ${hook.id}`} action=${buttons}>
    <p class="quiet"><span class="tag">${hook.kind}</span><span class="tag">at ${spaced(hook.point)}</span>${lost.length > 0 && html`<strong>${lost.join(", ")}</strong>`}</p>
    ${mayEdit && kind
      ? html`<${Settings} name=${name} hook=${hook} kind=${kind} again=${again} />`
      : html`<dl class="plain-values">${Object.entries(hook.settings).map(([field, value]) => html`<div><dt>${spaced(field)}</dt><dd>${shown(value)}</dd></div>`)}</dl>`}
  </${Section}>`;
}

export function Hooks({ name, stamp, mayEdit }) {
  const catalogue = useResource(() => get("/hooks"), "");
  const installed = useResource(() => all(modelPath(name, "hooks"), "hooks"), stamp);
  const [removed, setRemoved] = useState(null);
  const [problem, setProblem] = useState(null);
  if (!catalogue.found || !installed.found) return html`<${Loading} problem=${catalogue.problem ?? installed.problem} />`;
  const { hooks } = installed.found;
  async function move(hook, position) {
    setProblem(null);
    try {
      await send("PATCH", modelPath(name, "hooks", hook.id), { position });
    } catch (refusal) {
      setProblem(refusal);
    }
    installed.again();
  }
  return html`
    <p class="quiet lead">${hooks.length ? "Hooks run in this order, at their points." : "No hook is installed."}</p>
    <${ProblemNote} problem=${problem} />
    ${hooks.map((hook, place) => html`<${Installed} key=${hook.id} name=${name} hook=${hook} kind=${catalogue.found.hooks.find((kind) => kind.name === hook.name)}
      place=${place} last=${hooks.length - 1} mayEdit=${mayEdit} again=${installed.again} onRemove=${setRemoved} onMove=${move} />`)}
    ${mayEdit && html`<${Add} name=${name} catalogue=${catalogue.found.hooks} again=${installed.again} />`}
    ${removed && html`<${Ask} title=${`Remove ${removed.id}?`} word="Remove" onClose=${() => setRemoved(null)}
      act=${async () => {
        await send("DELETE", modelPath(name, "hooks", removed.id));
        installed.again();
      }}><p>The next version is made without it. What it has gathered is gone.</p></${Ask}>`}`;
}
