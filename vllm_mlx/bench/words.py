"""Common words, from which prompts of any length are made. Most are one token in most vocabularies."""

from __future__ import annotations

import random

WORDS = tuple(
    """
    able above acid across act after again age air all almost alone along amber among animal answer apple april arm
    army art autumn away baby back bad bag ball bank base basket bath bean bear beat bed before begin behind bell below
    best bird black block blood blue board boat body bone book born both bottle bowl box boy branch brass bread break
    bridge bright bring broad brother brown brush bucket build burn bus butter button buy cake call canal canyon card
    care carry cart cat cause chain chalk chance chair cheese chief child circle city class clay clean clear clock
    close cloth cloud coal coast coat cold color come cook copper corn cotton count cover cow crowd cry cup cut dance
    dark day deep degree desk door down draw dream dress drink drive dry dust early earth east edge egg eight end
    engine enough evening every eye face fall family farm fast father feel fence field fight find fine fire first fish
    five flag flat floor flower fly fold food foot forest form forty four free friend front fruit full game garden
    gate gave girl give glass glove goat gold good grain grass gray great green ground group grow guide half hall
    hammer hand happy harbor hard hat head heart heavy help here high hill hold hollow home honey hope horse hour
    house hundred ice idea ink inside iron island job join jump keep kettle key kind king kitchen knee knife know lake
    lamp land large last late laugh leaf learn left leg lemon letter level light line lion list live lock long look
    loud low machine map march mark market master match may meal measure meat meet metal middle milk mind mine minute
    mirror money month moon morning mother mountain mouth move music nail name narrow near neck needle nest never new
    night nine noise north nose note now number oak ocean office oil old open orange order oven over page paint pair
    paper park part past path pen pencil people pepper picture piece pin pipe place plain plant plate play pocket
    point pool port post pot powder present price print pull pump push queen quick quiet rail rain rest rice rich ride
    right ring river road rock roof room root rope rose round rule run sail salt same sand say school sea seat second
    seed seven shade sharp sheep shelf ship shirt shoe shop short silk silver simple sister six skin sky sleep slow
    small smoke snow soap soft song sound soup south space spoon spring square stamp star station steam steel step
    stick stone stop store story street strong sugar summer sun sweet table tail tall teach ten thick thin thread
    three thumb ticket till time tin today tooth top town train tree turn twelve two uncle under valley velvet village
    violet voice wall warm wash watch water wave wax week west wheel white wide wild wind window winter wire wood wool
    word work yard year yellow young
    """.split()  # noqa: SIM905
)


def draw_words(count: int, draw: random.Random) -> list[str]:
    """`count` words, the same for the same state of `draw`."""
    return draw.choices(WORDS, k=count)
